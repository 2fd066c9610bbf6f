// Package sdk drives the published E2B SDKs, unmodified, against a real
// `wrenn up`: the scripts below py and js, each check of theirs a subtest. The
// versions are locked by requirements.txt and package-lock.json; they are
// installed once into the development directory, Node.js among them.
package sdk
