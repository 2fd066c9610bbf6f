package control

import (
	"strings"
	"testing"
)

// TestStateTableIsComplete compares the whole table, all 64 pairs, with a
// matrix written by hand: a asked, f found, b both, . neither.
func TestStateTableIsComplete(t *testing.T) {
	const matrix = `
	          pending running pausing paused resuming stopping stopped error
	pending   .       b       .       f      .        a        .       f
	running   .       .       a       f      .        a        .       f
	pausing   .       b       .       b      .        a        .       f
	paused    .       f       .       .      a        a        .       f
	resuming  .       b       .       b      .        a        .       b
	stopping  .       .       .       .      .        .        a       a
	stopped   .       .       .       .      .        .        .       .
	error     .       f       .       f      a        a        .       .`
	lines := strings.Split(strings.TrimSpace(matrix), "\n")
	columns := strings.Fields(lines[0])
	seen := 0
	for _, line := range lines[1:] {
		cells := strings.Fields(line)
		from := Status(cells[0])
		for i, cell := range cells[1:] {
			to := Status(columns[i])
			if !from.Valid() || !to.Valid() {
				t.Fatalf("the matrix names %s, %s", from, to)
			}
			seen++
			if want := cell == "a" || cell == "b"; CanMove(from, to) != want {
				t.Errorf("CanMove(%s, %s) is %v", from, to, !want)
			}
			if want := cell == "f" || cell == "b"; CanFind(from, to) != want {
				t.Errorf("CanFind(%s, %s) is %v", from, to, !want)
			}
		}
	}
	if seen != len(Statuses)*len(Statuses) || len(transitions) != len(Statuses) {
		t.Errorf("%d pairs compared, %d states in the table; there are %d states", seen, len(transitions), len(Statuses))
	}
}

// TestEveryStateHasAWayOut: all states but stopped lead to stopping, and from
// there to stopped.
func TestEveryStateHasAWayOut(t *testing.T) {
	for _, st := range Statuses {
		if st != StatusStopped && st != StatusStopping && !CanMove(st, StatusStopping) {
			t.Errorf("%s cannot be deleted", st)
		}
	}
	if !CanMove(StatusStopping, StatusStopped) {
		t.Error("stopping does not end")
	}
	if CanMove("nonsense", StatusStopping) || CanFind(StatusRunning, "nonsense") {
		t.Error("a state that does not exist leads somewhere")
	}
}
