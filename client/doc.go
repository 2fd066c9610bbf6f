// Package client is the Go SDK of Wrenn Sandbox: one typed method for every
// call of the REST and WebSocket API, nothing more. Anybody may import it; it
// imports only the standard library and a WebSocket library, never anything
// internal to Wrenn, so that it can do no more than any other user of the API.
//
//	c, err := client.New(client.Options{BaseURL: "http://127.0.0.1:8000", APIKey: key})
//	sb, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{Template: "base"})
//	res, err := c.Exec(ctx, sb.ID, client.ExecRequest{Cmd: "uname", Args: []string{"-a"}})
//
// What holds everywhere:
//
//   - An answer outside 2xx is an [*Error] with the server's code. Ask with
//     [IsNotFound] and its siblings, or errors.Is(err, client.ErrNotFound).
//   - An identifier, name or count that the server could only refuse is refused
//     here, also as an [*Error], before anything is sent (Status is then 0).
//     An empty ID never becomes a request about all sandboxes.
//   - Only GETs whose connection failed before an answer came are tried again.
//     A call that changes something is sent at most once; the server goes on
//     with what it accepted even when the caller's context ends.
//   - Contents of files and of streams are streamed: no method holds a file in
//     memory, and a cut transfer is an error, never a short success.
//   - A Client is safe for concurrent use. Its methods start no goroutines that
//     outlive the call, except that a Stream and a file being read hold their
//     connection until they are closed.
package client
