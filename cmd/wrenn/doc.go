// Command wrenn is the whole of Wrenn Sandbox for a person at a shell: it
// serves (up, pager), looks after a host (doctor, store, template build), and
// works on sandboxes, snapshots and templates of a running server.
//
// The commands that work on a server do so only through package client: they
// have no private way in. Each verb has its file; root.go puts them together,
// exit.go is the one place that turns errors into messages and exit codes.
package main
