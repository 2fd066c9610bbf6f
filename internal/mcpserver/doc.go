// Package mcpserver offers sandboxes to AI agents as tools of the Model Context
// Protocol. It is a translation and nothing more: every tool is one call, or a
// few, of the public API through package client, with the caller's own key.
//
// Imported by cmd/wrenn. It imports only client and the MCP SDK.
//
// Invariants:
//
//  1. What a tool returns is bounded, whatever the guest prints or the list
//     holds: a model's context is small and dear. What was left out is said,
//     with the way to get it.
//  2. A command is bounded in time. One whose caller cancels is stopped.
//  3. A refusal is a tool error, never a protocol error: the model reads what
//     went wrong and what to do about it.
//  4. The server keeps no state of its own: over HTTP every request is answered
//     with the key that it carries.
package mcpserver
