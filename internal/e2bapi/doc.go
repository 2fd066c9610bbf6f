// Package e2bapi is the control surface that the published E2B SDKs speak: it
// translates between their HTTP and control.Service and decides nothing.
// Traffic into sandboxes is internal/proxy's. Imported by cmd/wrenn; it may
// import control.
//
// Invariants:
//
//  1. Every error is {"code":<HTTP status>,"message"}: one SDK reads the body's
//     code, the other the status. Text of an internal error stays in the log.
//  2. Success codes and required fields are exactly what the SDKs' generated
//     clients ask for.
//  3. Unknown fields are taken and ignored, as newer SDKs send more; a field
//     that asks for what is not there is a 400 that names it.
package e2bapi
