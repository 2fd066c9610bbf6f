// Package guest is the guest agent: the service in each sandbox through which
// the host, and through the host its clients, run processes, move files and
// confirm a new life. cmd/envd runs it; on the host nothing imports it: the
// host speaks to it with the generated clients of process and filesystem and
// the plain HTTP calls below. It may import generated RPC types and
// internal/guest/boot.
//
// # Wire
//
// HTTP/1.1, and HTTP/2 without TLS, on port 49983. Connect, gRPC and gRPC-web
// in proto and JSON, names as the published E2B SDKs have them. Answers of
// Connect calls are never compressed.
//
//	process.Process        Start Connect List SendInput StreamInput CloseStdin SendSignal Update
//	filesystem.Filesystem  Stat MakeDir Move ListDir Remove WatchDir CreateWatcher GetWatcherEvents RemoveWatcher
//	GET  /health           204
//	POST /init             the host's confirmation, see InitRequest, InitResponse
//	POST /sync             204 when all file systems are flushed
//	GET  /files            ?path&username&signature&signature_expiration: the bytes
//	POST /files            the same query; multipart/form-data with parts named "file", or
//	                       application/octet-stream; Content-Encoding gzip; X-Metadata-* headers
//	                       become user.e2b.* attributes. 200 [{name,path,type:"file",metadata?}]
//	GET  /metrics          see metrics; bytes, percent, Unix seconds
//	GET  /envs             {"NAME":"value"} given by /init
//
// Headers: X-Access-Token (the sandbox's token), Authorization: Basic
// base64("user:") (who runs it; left out: the default user),
// Connect-Timeout-Ms, Keepalive-Ping-Interval (seconds, 1 to 86400, default
// 90). GET /files is compressed only where Accept-Encoding is exactly "gzip":
// a Go client that wants the bytes sets Transport.DisableCompression.
//
// Who may call what is said at guard. The host forwards its clients' calls
// from the gateway's address, too: it must not forward /init and /sync.
//
// # Errors
//
// Connect calls: Connect's codes. Plain calls: {"code":<status>,"message"}.
//
//	invalid_argument     400  a field that is named; a command, cwd or directory that is not there or is not one
//	unauthenticated      401  token, signature, or "invalid username: 'x'"
//	permission_denied    403  not executable; not the gateway
//	not_found            404  no such process, watcher, file
//	already_exists       409  MakeDir of what there is
//	failed_precondition  409  no terminal, no input, input closed, file busy, no attributes
//	resource_exhausted   507  disk full, too many processes, watches, entries
//	unavailable          503  not confirmed by /init
//	deadline_exceeded         a Connect-Timeout-Ms has passed
//	internal             500  a failed /init: "step <name>: …"
//
// # Processes
//
// Start resolves the command in the process's own PATH and runs it in a session
// of its own, with the user's ids, groups, HOME, USER, LOGNAME, SHELL, then the
// variables of /init, then the call's. Events: start{pid} always first, data,
// keepalive where the stream was silent, end. exit_code is -1 where a signal
// ended it, and status names that signal. A Connect-Timeout-Ms of Start is the
// process's lifetime: it is killed and the stream ends with deadline_exceeded
// and without an end event. A disconnect ends no process. Signals go to the
// process's group.
//
// The end is told when the process has exited and its output is at its end, or
// silent for quietTime although a child holds it open; that child may write on,
// to nobody.
//
// Output that no client has taken is kept up to outputLimit (256 KiB) for each
// process. While a client is attached a full buffer holds the process up, and
// nothing is lost; while none is, the oldest output is dropped. Connect goes
// on after the last piece that any client was sent. A process that ended while
// nobody was attached is kept (the last maxEnded of them) until a client has
// seen its end.
//
// # Generation
//
// RunDir/generation holds the id of this life: replaced in one step (rename)
// by each /init, before the agent serves anything in that life. A program that
// keeps random state, unique ids or leases of its own watches the directory
// for IN_MOVED_TO of that name, or compares the file's content before use, and
// starts over when it changes.
//
// # Invariants
//
//  1. From the start of an /init with a new generation until all its steps are
//     done, and before the first one, only /health and /init answer.
//  2. Each step of /init may be repeated; one that fails is a 500 naming it,
//     and the same call again does all of them.
//  3. No client's absence, slowness or garbage ends a process, or blocks a call
//     about another one.
//  4. Memory is bounded: by outputLimit for each process, maxWatcherEvents for
//     each watcher, copyBuffer for each transfer, maxMessage for each call.
//  5. A process id is signalled only while it is the process's own.
package guest
