// Package httpapi is the REST and WebSocket interface of DESIGN §4: it
// translates between HTTP and control.Service and decides nothing.
//
// Imported by cmd only. openapi.yaml, embedded and served, is the specification;
// a test drives every route and checks requests and answers against it.
//
// Invariants:
//
//  1. Every error is {"error":{"code","message"}}. Text of internal_error stays
//     in the log, beside the request's ID.
//  2. Nothing of a request is used before it is bounded: JSON bodies and
//     WebSocket messages at 1 MiB; files are streamed and not bounded.
//  3. An unknown field or query parameter is an error that names it.
package httpapi
