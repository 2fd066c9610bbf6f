package client_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"strings"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/client/clienttest"
)

// exampleClient stands for client.New with the address of a real server.
func exampleClient() (*client.Client, func()) {
	s := clienttest.New()
	c, err := client.New(client.Options{BaseURL: s.URL, APIKey: clienttest.Key})
	if err != nil {
		log.Fatal(err)
	}
	return c, s.Close
}

func Example() {
	c, done := exampleClient()
	defer done()
	ctx := context.Background()

	sb, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{Template: "base"})
	if err != nil {
		log.Fatal(err)
	}
	defer c.DeleteSandbox(ctx, sb.ID)

	res, err := c.Exec(ctx, sb.ID, client.ExecRequest{Cmd: "echo", Args: []string{"hello", "world"}})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("exit code %d: %s", res.ExitCode, res.Stdout)
	// Output: exit code 0: hello world
}

func ExampleNew() {
	c, err := client.New(client.Options{
		BaseURL: os.Getenv("WRENN_URL"), // empty: http://127.0.0.1:8000
		APIKey:  os.Getenv("WRENN_API_KEY"),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(c.BaseURL() != "")
	// Output: true
}

func ExampleClient_ExecStream() {
	c, done := exampleClient()
	defer done()
	ctx := context.Background()
	sb, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{})
	if err != nil {
		log.Fatal(err)
	}

	s, err := c.ExecStream(ctx, sb.ID, client.ExecRequest{Cmd: "cat"})
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	fmt.Fprintln(s, "to the command's input")
	if err := s.CloseStdin(); err != nil {
		log.Fatal(err)
	}
	code, err := s.Copy(os.Stdout, os.Stderr)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("exit code", code)
	// Output:
	// to the command's input
	// exit code 0
}

func ExampleClient_PutFile() {
	c, done := exampleClient()
	defer done()
	ctx := context.Background()
	sb, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{Template: "base"})
	if err != nil {
		log.Fatal(err)
	}

	err = c.PutFile(ctx, sb.ID, "/work/hello.txt", strings.NewReader("hello\n"), client.PutOptions{Mode: 0o600})
	if err != nil {
		log.Fatal(err)
	}
	f, err := c.GetFile(ctx, sb.ID, "/work/hello.txt", "")
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(os.Stdout, f); err != nil {
		log.Fatal(err)
	}
	// Output: hello
}

func ExampleClient_Sandboxes() {
	c, done := exampleClient()
	defer done()
	ctx := context.Background()
	for range 3 {
		if _, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{Template: "base"}); err != nil {
			log.Fatal(err)
		}
	}
	for sb, err := range c.Sandboxes(ctx, client.ListSandboxesOptions{Status: []string{client.StatusRunning}}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(sb.ID, sb.Status)
	}
	// Output:
	// sb1 running
	// sb2 running
	// sb3 running
}

func ExampleIsNotFound() {
	c, done := exampleClient()
	defer done()
	_, err := c.GetSandbox(context.Background(), "nobody")
	fmt.Println(client.IsNotFound(err), err)
	// Output: true not_found: there is no sandbox nobody
}
