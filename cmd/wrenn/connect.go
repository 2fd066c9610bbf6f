package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"git.omukk.dev/wrenn/sandbox/client"
)

const defaultDir = "/var/lib/wrenn"

// stateDir is the server's state directory on its own host.
func stateDir() string { return cmp.Or(os.Getenv("WRENN_DIR"), defaultDir) }

func serverURL() string { return cmp.Or(os.Getenv("WRENN_URL"), client.DefaultBaseURL) }

func keyFile() string { return filepath.Join(stateDir(), "api-key") }

// keySource says where apiKey finds the key, for messages.
func keySource() string {
	if os.Getenv("WRENN_API_KEY") != "" {
		return "WRENN_API_KEY"
	}
	return keyFile()
}

// connect makes the client that all commands use.
func connect() (*client.Client, error) {
	key, err := apiKey()
	if err != nil {
		return nil, err
	}
	c, err := client.New(client.Options{BaseURL: serverURL(), APIKey: key, UserAgent: "wrenn-cli/" + version()})
	if err != nil {
		return nil, usagef("%w (from WRENN_URL and %s)", err, keySource())
	}
	return c, nil
}

func apiKey() (string, error) {
	if key := os.Getenv("WRENN_API_KEY"); key != "" {
		return key, nil
	}
	key, err := keyIn(keyFile())
	if err != nil {
		return "", noKeyError{fmt.Errorf("no API key: WRENN_API_KEY is not set and %w", err)}
	}
	return key, nil
}

// keyIn reads a key file.
func keyIn(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("%s %s", name, whyNot(err))
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return "", fmt.Errorf("%s cannot be read: %w", name, err)
	}
	key := strings.TrimSpace(string(b))
	if key == "" {
		return "", fmt.Errorf("%s is empty", name)
	}
	return key, nil
}

func whyNot(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "does not exist (wrenn up writes it when it starts for the first time)"
	case errors.Is(err, fs.ErrPermission):
		return "may not be read by you"
	}
	return "cannot be read: " + err.Error()
}
