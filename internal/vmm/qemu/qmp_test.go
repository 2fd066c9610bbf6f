package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}` + "\n"

// server is a scripted QEMU.
type server struct {
	t    *testing.T
	conn *net.UnixConn
	r    *bufio.Reader
}

func pair(t *testing.T) (*net.UnixConn, *server) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], &server{t: t, conn: conns[1], r: bufio.NewReader(conns[1])}
}

func (s *server) say(lines ...string) {
	for _, l := range lines {
		if _, err := s.conn.Write([]byte(l)); err != nil {
			s.t.Errorf("server: %v", err)
		}
	}
}

type command struct {
	Execute string
	ID      uint64
}

func (s *server) hear() (c command) {
	line, err := s.r.ReadBytes('\n')
	if err != nil {
		s.t.Errorf("server: %v", err)
		return c
	}
	if err := json.Unmarshal(line, &c); err != nil {
		s.t.Errorf("server: %v", err)
	}
	return c
}

func (s *server) answer(c command, value string) {
	s.say(fmt.Sprintf(`{"return": %s, "id": %d}`+"\n", value, c.ID))
}

// serve greets, takes qmp_capabilities, then runs f.
func (s *server) serve(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.say(greeting)
		s.answer(s.hear(), "{}")
		f()
	}()
	return done
}

func limited(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestQMPCommandsAndEvents(t *testing.T) {
	conn, s := pair(t)
	events := make(chan string, 10)
	done := s.serve(func() {
		// Events before, between and after; replies in the wrong order; a
		// reply that nobody waits for.
		s.say(`{"event": "RESUME", "timestamp": {}}` + "\r\n")
		a, b := s.hear(), s.hear()
		s.say(`{"event": "MIGRATION", "data": {"status": "setup"}}` + "\n")
		s.say(`{"return": {}, "id": 4711}` + "\n")
		for _, c := range []command{b, a} {
			s.answer(c, fmt.Sprintf(`{"name": %q}`, c.Execute))
		}
		s.say(`{"event": "MIGRATION", "data": {"status": "completed"}}` + "\n")
	})
	ctx := limited(t, time.Minute)
	c, err := newQMP(ctx, conn, func(e qmpEvent) { events <- e.Name })
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	ended, forget := expectEnd(c)
	defer forget()
	errs := make(chan error, 2)
	for _, name := range []string{"first", "second"} {
		go func() {
			var out struct{ Name string }
			err := c.execute(ctx, name, nil, &out)
			if err == nil && out.Name != name {
				err = fmt.Errorf("%s got the reply of %s", name, out.Name)
			}
			errs <- err
		}()
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if status, _ := migrationEnd(<-ended); status != "completed" {
		t.Errorf("the migration ended %q", status)
	}
	<-done
	for _, want := range []string{"RESUME", "MIGRATION", "MIGRATION"} {
		if got := <-events; got != want {
			t.Errorf("event %s, want %s", got, want)
		}
	}
}

func TestQMPError(t *testing.T) {
	conn, s := pair(t)
	s.serve(func() {
		c := s.hear()
		s.say(fmt.Sprintf(`{"error": {"class": "GenericError", "desc": "no such thing"}, "id": %d}`+"\n", c.ID))
	})
	ctx := limited(t, time.Minute)
	c, err := newQMP(ctx, conn, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	err = c.execute(ctx, "eject", nil, nil)
	var qe *qmpError
	if !errors.As(err, &qe) || qe.Class != "GenericError" || !strings.Contains(err.Error(), "eject: no such thing") {
		t.Errorf("error: %v", err)
	}
	if !c.alive() {
		t.Error("a refused command ended the connection")
	}
}

// TestQMPHostile: whatever the other side does, commands end with an error
// soon, and the reader ends.
func TestQMPHostile(t *testing.T) {
	for name, c := range map[string]struct {
		say  func(*server)
		want string
	}{
		"closed at once":          {func(s *server) { s.conn.Close() }, "closed the control connection"},
		"garbage for a greeting":  {func(s *server) { s.say("SSH-2.0\n") }, "not QMP"},
		"no greeting":             {func(s *server) { s.say(`{"return": {}}` + "\n") }, "did not greet"},
		"endless line":            {func(s *server) { endless(s.conn) }, "too long"},
		"garbage for a reply":     {func(s *server) { s.say(greeting); s.hear(); s.say("}{\n") }, "not QMP"},
		"closed before the reply": {func(s *server) { s.say(greeting); s.hear(); s.conn.Close() }, "closed the control connection"},
		"cut reply":               {func(s *server) { s.say(greeting); s.hear(); s.say(`{"return"`); s.conn.Close() }, "not QMP"},
		"error without an id": {func(s *server) { s.say(greeting); s.hear(); s.say(`{"error": {"desc": "what?"}}` + "\n") },
			"what?"},
		"silence":             {func(*server) {}, "deadline"},
		"silence after greet": {func(s *server) { s.conn.Write([]byte(greeting)); s.r.ReadBytes('\n') }, "deadline"},
	} {
		t.Run(name, func(t *testing.T) {
			conn, s := pair(t)
			done := make(chan struct{})
			go func() { defer close(done); c.say(s) }()
			limit := time.Minute
			if c.want == "deadline" {
				limit = 200 * time.Millisecond
			}
			q, err := newQMP(limited(t, limit), conn, nil)
			if err == nil {
				q.close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			<-done
			if _, err := conn.Write([]byte("x")); err == nil {
				t.Error("the connection was left open")
			}
		})
	}
}

func endless(c *net.UnixConn) {
	junk := []byte(strings.Repeat("x", 64<<10))
	for range 2 * qmpMaxLine / len(junk) {
		if _, err := c.Write(junk); err != nil {
			return // the client has had enough, as it should
		}
	}
}

// TestQMPGivenUp: a command that is given up leaves the connection usable, and
// its late reply hits nobody.
func TestQMPGivenUp(t *testing.T) {
	conn, s := pair(t)
	gaveUp := make(chan struct{})
	ctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	s.serve(func() {
		late := s.hear()
		giveUp()
		<-gaveUp
		s.answer(late, `{"name": "late"}`)
		c := s.hear()
		s.answer(c, `{"name": "fresh"}`)
	})
	c, err := newQMP(limited(t, time.Minute), conn, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if err := c.execute(ctx, "slow", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("slow: %v", err)
	}
	close(gaveUp)
	var out struct{ Name string }
	if err := c.execute(limited(t, time.Minute), "next", nil, &out); err != nil || out.Name != "fresh" {
		t.Errorf("next: %q, %v", out.Name, err)
	}
}

// TestQMPPassesFiles: the descriptor arrives with the command's bytes.
func TestQMPPassesFiles(t *testing.T) {
	conn, s := pair(t)
	got := make(chan []byte, 1)
	go func() {
		s.say(greeting)
		s.answer(s.hear(), "{}")
		buf, oob := make([]byte, 4096), make([]byte, 64)
		n, oobn, _, _, err := s.conn.ReadMsgUnix(buf, oob)
		if err != nil {
			t.Error(err)
		}
		var c command
		if err := json.Unmarshal(buf[:n], &c); err != nil {
			t.Error(err)
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(msgs) != 1 {
			t.Errorf("%d control messages, %v", len(msgs), err)
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) != 1 {
			t.Errorf("%d descriptors, %v", len(fds), err)
		}
		b := make([]byte, 5)
		_, _ = unix.Pread(fds[0], b, 0)
		unix.Close(fds[0])
		got <- b
		s.answer(c, "{}")
	}()
	ctx := limited(t, time.Minute)
	c, err := newQMP(ctx, conn, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("hello"); err != nil {
		t.Fatal(err)
	}
	if err := c.execute(ctx, "getfd", args{"fdname": "x"}, nil, f); err != nil {
		t.Fatal(err)
	}
	if b := <-got; string(b) != "hello" {
		t.Errorf("the descriptor reads %q", b)
	}
}
