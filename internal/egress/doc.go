// Package egress completes guests' HTTP requests: where a sandbox's rules name
// headers for a host, it takes the guest's connection to that host, adds the
// headers and sends the request on. The guest so uses keys that it never sees.
// Imported by internal/engine (which reads the rules) and cmd/wrenn.
//
// Invariants:
//
//  1. Headers go only to a host that the name belongs to: the host of a request
//     is looked up by this process, whatever address the guest meant, and over
//     TLS its certificate is verified for the name.
//  2. A connection that no rule is about is passed on as it is, unread but for
//     the name in its first bytes.
//  3. All that goes out goes by the slot's Way, so that it reaches no more than
//     the guest itself may reach.
//  4. Values of headers are neither logged nor told to the guest. TRACE, which
//     would have the host tell them, is refused; a host that repeats a request's
//     headers in its answer does tell them.
//  5. What one guest can hold is bounded: connections by hostnet, streams,
//     headers and the time of a silent peer here.
package egress
