// Package e2e holds the promises of the whole product, kept on real virtual
// machines. Its tests drive `wrenn up` only through what its users have: the
// API, the SDK and the command line. What they look at besides is what any
// owner of the host can see: processes, network, files.
//
// Most tests share one server and one warm snapshot (see main_test.go); those
// that kill, fill or count have a server of their own.
package e2e
