package sdk

import "testing"

// Templates that the SDKs build: files, variables, start command, tags, and what
// a failed build says and leaves.
func TestTemplatesInPython(t *testing.T) {
	script(t, modeA(t), sdk.python(), "py/templates.py")
}

func TestTemplatesInJavaScript(t *testing.T) {
	script(t, modeA(t), sdk.node(), "js/templates.mjs")
}
