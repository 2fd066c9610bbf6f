package httpapi

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// maxJSON bounds a JSON body and a message of a stream, in bytes.
const maxJSON = 1 << 20

// readJSON reads a body of one JSON object into dst, a pointer to a struct.
func readJSON(w http.ResponseWriter, r *http.Request, dst any) error {
	b, err := readBody(w, r)
	if err != nil {
		return err
	}
	if len(b) == 0 {
		return control.Invalid("body", "must be a JSON object; it is empty")
	}
	return decodeObject("body", b, dst)
}

// noBody checks the body of a call that takes none: nothing, or an empty object.
func noBody(w http.ResponseWriter, r *http.Request) error {
	b, err := readBody(w, r)
	if err != nil || len(b) == 0 {
		return err
	}
	return decodeObject("body", b, &struct{}{})
}

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxJSON))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, &control.Error{Code: control.CodeTooLarge, Message: "body: must be at most 1 MiB of JSON; files go to PUT /v1/sandboxes/{id}/files"}
	}
	if err != nil {
		return nil, &control.Error{Code: control.CodeInvalid, Message: "body: ended before it was whole", Err: err}
	}
	return bytes.TrimSpace(b), nil
}

// decodeObject decodes exactly one JSON object and names the field of what is
// wrong. what names the whole.
func decodeObject(what string, b []byte, dst any) error {
	if len(b) == 0 || b[0] != '{' {
		return control.Invalid(what, "must be a JSON object")
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(b, &fields); err != nil {
		return control.Invalid(what, "is not valid JSON: %v", err)
	}
	// encoding/json also takes fields that differ in case; the document does not.
	known := fieldNames(dst)
	for name, raw := range fields {
		if hasNull(raw) {
			return control.Invalid(quoteShort(name), "must not be or hold null; leave it out instead")
		}
		if !slices.Contains(known, name) {
			if len(known) == 0 {
				return control.Invalid(quoteShort(name), "unknown field; there are none here")
			}
			return control.Invalid(quoteShort(name), "unknown field; there are %s", strings.Join(known, ", "))
		}
	}
	err := json.Unmarshal(b, dst)
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return control.Invalid(e.Field, "must be %s; got %s", jsonKind(e.Type), e.Value)
	}
	if err != nil {
		return control.Invalid(what, "is not valid JSON: %v", err)
	}
	return nil
}

// hasNull finds a null, which encoding/json would take for an empty value.
func hasNull(raw json.RawMessage) bool {
	dec := json.NewDecoder(bytes.NewReader(raw))
	for {
		tok, err := dec.Token()
		if err != nil {
			return false // The end: raw is valid JSON.
		}
		if tok == nil {
			return true
		}
	}
}

func fieldNames(dst any) []string {
	var names []string
	for f := range reflect.TypeOf(dst).Elem().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		names = append(names, name)
	}
	return names
}

// quoteShort makes a caller's own text fit for an error.
func quoteShort(s string) string {
	if len(s) > 64 {
		s = s[:64]
	}
	q := strconv.Quote(s)
	if q[1:len(q)-1] == s {
		return s
	}
	return q
}

func jsonKind(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "an array of strings"
	case reflect.Map, reflect.Struct:
		return "an object of strings"
	}
	return "a whole number that fits in 64 bits"
}

// decodeData undoes the encoding of data in a request.
func decodeData(field, data, encoding string) ([]byte, error) {
	switch encoding {
	case "", encodingUTF8:
		return []byte(data), nil
	case encodingBase64:
		b, err := base64.StdEncoding.DecodeString(data)
		if err != nil {
			return nil, control.Invalid(field, "is not valid base64: %v", err)
		}
		return b, nil
	}
	return nil, control.Invalid("encoding", "must be %q or %q", encodingUTF8, encodingBase64)
}

// query reads the parameters of the URL, each at most once; names ending in a
// dot are prefixes.
func query(r *http.Request, known ...string) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, control.Invalid("query", "is not validly encoded: %v", err)
	}
	for name, values := range q {
		ok := slices.ContainsFunc(known, func(k string) bool {
			return k == name || (strings.HasSuffix(k, ".") && strings.HasPrefix(name, k))
		})
		if !ok {
			if len(known) == 0 {
				return nil, control.Invalid(quoteShort(name), "unknown query parameter; there are none here")
			}
			return nil, control.Invalid(quoteShort(name), "unknown query parameter; there are %s", strings.Join(known, ", "))
		}
		if len(values) > 1 {
			return nil, control.Invalid(quoteShort(name), "must be given once")
		}
	}
	return q, nil
}

// number reads a query parameter; absent is def.
func number(q url.Values, name string, base int, def, low, high int64) (int64, error) {
	if !q.Has(name) {
		return def, nil
	}
	n, err := strconv.ParseInt(q.Get(name), base, 64)
	if err != nil || n < low || n > high {
		return 0, control.Invalid(name, "must be a number from %s to %s in base %d",
			strconv.FormatInt(low, base), strconv.FormatInt(high, base), base)
	}
	return n, nil
}

func cursorString(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func parseCursor(s string) (string, error) {
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		return "", badCursor
	}
	return string(b), nil
}

var badCursor = control.Invalid("cursor", "must be next_cursor of an earlier answer, as it was")
