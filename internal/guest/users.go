package guest

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"connectrpc.com/connect"
)

// account is one user of the guest, as its own files tell.
type account struct {
	name   string
	uid    uint32
	gid    uint32
	groups []uint32
	home   string
	shell  string
}

// accounts reads the guest's user database. The files are read on each call:
// they are small, and a sandbox may add users at any time.
type accounts struct {
	passwd, group string
}

// lookup finds a user by name.
func (a accounts) lookup(name string) (account, error) {
	unknown := connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("invalid username: '%s'", clip(name)))
	if name == "" || len(name) > maxUser || strings.ContainsAny(name, ":\n\x00") {
		return account{}, unknown
	}
	var u account
	found := false
	err := eachRecord(a.passwd, 7, func(f []string) bool {
		if f[0] != name {
			return true
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			return true
		}
		u = account{name: name, uid: uint32(uid), gid: uint32(gid), home: f[5], shell: f[6]}
		found = true
		return false
	})
	if err != nil {
		return account{}, connect.NewError(connect.CodeInternal, fmt.Errorf("reading users: %w", err))
	}
	if !found {
		return account{}, unknown
	}
	if u.home == "" {
		u.home = "/"
	}
	if u.shell == "" {
		u.shell = "/bin/sh"
	}
	u.groups = []uint32{u.gid}
	// A guest without a group file has users without further groups.
	_ = eachRecord(a.group, 4, func(f []string) bool {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err == nil && uint32(gid) != u.gid && slices.Contains(strings.Split(f[3], ","), name) {
			u.groups = append(u.groups, uint32(gid))
		}
		return true
	})
	return u, nil
}

// names maps ids to names for listings; an id without a name stays a number.
func (a accounts) names() (users, groups map[uint32]string) {
	read := func(file string, fields int) map[uint32]string {
		m := map[uint32]string{}
		_ = eachRecord(file, fields, func(f []string) bool {
			if id, err := strconv.ParseUint(f[2], 10, 32); err == nil {
				if _, dup := m[uint32(id)]; !dup {
					m[uint32(id)] = f[0]
				}
			}
			return true
		})
		return m
	}
	return read(a.passwd, 7), read(a.group, 4)
}

// eachRecord calls yield with the fields of each line that has that many.
func eachRecord(file string, fields int, yield func([]string) bool) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if rec := strings.Split(sc.Text(), ":"); len(rec) == fields && !yield(rec) {
			return nil
		}
	}
	return sc.Err()
}

// callUser is the user a call is made as: the one it names (by query or by
// basic authentication), else the sandbox's default.
func (s *Server) callUser(named string, h http.Header) (account, error) {
	if named == "" {
		r := http.Request{Header: h}
		if user, _, ok := r.BasicAuth(); ok {
			named = user
		} else if h.Get("Authorization") != "" {
			return account{}, connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("authorization: not basic authentication"))
		}
	}
	if named != "" {
		return s.accounts.lookup(named)
	}
	if own := s.defaults().User; own != "" {
		if u, err := s.accounts.lookup(own); err == nil {
			return u, nil
		} // else the user was removed since
	}
	name := s.identity().DefaultUser
	if name == "" {
		name = defaultUser
	}
	u, err := s.accounts.lookup(name)
	if err != nil && name == defaultUser && codeOf(err) == connect.CodeUnauthenticated {
		return s.accounts.lookup("root")
	}
	return u, err
}

// resolvePath makes a caller's path absolute: "~" and relative paths are the
// user's, the empty path is def.
func resolvePath(field, p, def string, u account) (string, error) {
	if err := checkPath(field, p); err != nil {
		return "", err
	}
	switch {
	case p == "":
		p = def
	case p == "~":
		p = u.home
	case strings.HasPrefix(p, "~/"):
		p = path.Join(u.home, p[2:])
	case strings.HasPrefix(p, "~"):
		return "", invalidf("%s: %q: only ~ and ~/… are expanded", field, clip(p))
	}
	if p == "" {
		return "", invalidf("%s: missing", field)
	}
	if !filepath.IsAbs(p) {
		p = path.Join(u.home, p)
	}
	return filepath.Clean(p), nil
}
