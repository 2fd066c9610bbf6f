package control

// Status is the state of a sandbox.
type Status string

// The states. Stopped is kept as history for a while; to callers it is gone.
const (
	StatusPending  Status = "pending"
	StatusRunning  Status = "running"
	StatusPausing  Status = "pausing"
	StatusPaused   Status = "paused"
	StatusResuming Status = "resuming"
	StatusStopping Status = "stopping"
	StatusStopped  Status = "stopped"
	StatusError    Status = "error"
)

// Statuses lists every state.
var Statuses = []Status{
	StatusPending, StatusRunning, StatusPausing, StatusPaused,
	StatusResuming, StatusStopping, StatusStopped, StatusError,
}

// Valid reports whether s is one of Statuses.
func (s Status) Valid() bool {
	_, ok := transitions[s]
	return ok
}

// cause tells who may make a change of state.
type cause uint8

const (
	// asked: an operation makes it.
	asked cause = 1 << iota
	// found: reconciling makes it, because the host says so.
	found
)

// transitions is the one table of the state machine: from, to, and who may.
// Every state but stopped leads to stopping, so everything can be deleted.
var transitions = map[Status]map[Status]cause{
	StatusPending: {
		StatusRunning: asked | found, StatusPaused: found,
		StatusStopping: asked, StatusError: found,
	},
	StatusRunning: {
		StatusPausing: asked, StatusPaused: found,
		StatusStopping: asked, StatusError: found,
	},
	StatusPausing: {
		StatusPaused: asked | found, StatusRunning: asked | found,
		StatusStopping: asked, StatusError: found,
	},
	StatusPaused: {
		StatusResuming: asked, StatusRunning: found,
		StatusStopping: asked, StatusError: found,
	},
	// Back to an error goes a resume of one that the host refused.
	StatusResuming: {
		StatusRunning: asked | found, StatusPaused: asked | found,
		StatusStopping: asked, StatusError: asked | found,
	},
	// A delete that the host refused is an error that can be deleted again.
	// Reconciling only takes up again a delete that somebody asked for.
	StatusStopping: {StatusStopped: asked, StatusError: asked},
	// A host that comes back with what was thought lost puts it right. One that
	// was paused before can be brought back from there.
	StatusError: {
		StatusResuming: asked,
		StatusStopping: asked, StatusRunning: found, StatusPaused: found,
	},
	StatusStopped: {},
}

// CanMove reports whether an operation may change from into to.
func CanMove(from, to Status) bool { return transitions[from][to]&asked != 0 }

// CanFind reports whether reconciling may change from into to.
func CanFind(from, to Status) bool { return transitions[from][to]&found != 0 }
