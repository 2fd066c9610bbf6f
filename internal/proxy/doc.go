// Package proxy carries the traffic of clients into sandboxes: to the guest
// agent, and to the ports that a guest's programs listen on. cmd/wrenn puts it
// in front of the API's handler. It may import control.
//
// # Routing
//
// A request is for a sandbox when, in this order,
//
//  1. its Host begins with <port>-<id>. ;
//  2. it has the header E2b-Sandbox-Id (and E2b-Sandbox-Port, default 49983);
//  3. it is for /files with a signature: it names no sandbox, and the one is
//     meant whose token makes that signature.
//
// Everything else goes to the next handler.
//
// # Answers of the proxy's own
//
// {"sandboxId","message","code"[,"port"]}, code being the HTTP status: 502 for a
// sandbox that is paused or gone ("The sandbox was not found"), for a port on
// which nothing listens ("… port is not open"), for a guest that does not
// answer; 400, 403, 404 and 429 as the message says. A stream that breaks once
// its answer has begun is reset, never ended in order.
//
// # Invariants
//
//  1. A connection is made to the sandbox and the port that routing chose, by
//     the control plane, inside that sandbox's network namespace. Nothing that
//     a guest answers (redirects, alternative services) is followed.
//  2. The host's own calls (/init, /sync) are not forwarded, and every request
//     that is carries X-Forwarded-For, by which the guest agent knows it.
//  3. What opens a private port stays with the proxy: the guest never sees it.
//  4. A cookie of a guest's program is for its own host alone.
//  5. Nothing is forwarded after which the proxy would not see what it forwards:
//     no CONNECT, and no upgrade on the guest agent's port.
//  6. Bodies are streamed through bounded buffers; headers of both sides are
//     bounded; a body that stalls ends after idleBody.
package proxy
