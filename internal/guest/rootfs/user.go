package rootfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
)

// sandboxUser is who commands run as, as the E2B SDKs have it.
const sandboxUser = "user"

const (
	firstID = 1000
	lastID  = 60000
	// maxAccounts bounds what is read of an image's user database.
	maxAccounts = 4 << 20
)

// ensureUser makes a user, where the image has none of the name, as useradd
// would; not every image has that. Its groups are those by which distributions
// allow sudo.
func ensureUser(etc, name, home string) error {
	passwd, err := readAccounts(path.Join(etc, "passwd"))
	if err != nil {
		return err
	}
	group, err := readAccounts(path.Join(etc, "group"))
	if err != nil {
		return err
	}
	if len(passwd) == 0 {
		passwd, group = []string{"root:x:0:0:root:/root:/bin/sh"}, []string{"root:x:0:"}
	}
	if u := record(passwd, name); u != nil {
		return makeHome(u)
	}
	id := freeID(passwd, group)
	user := fmt.Sprintf("%s:x:%d:%d::%s:/bin/bash", name, id, id, home)
	if g := record(group, name); g != nil && len(g) > 2 {
		user = fmt.Sprintf("%s:x:%d:%s::%s:/bin/bash", name, id, g[2], home)
	} else {
		group = append(group, fmt.Sprintf("%s:x:%d:", name, id))
	}
	for i, line := range group {
		if f := strings.Split(line, ":"); len(f) == 4 && (f[0] == "sudo" || f[0] == "wheel") {
			group[i] = strings.TrimSuffix(strings.Join(f, ":")+","+name, ",")
			if f[3] == "" {
				group[i] = line + name
			}
		}
	}
	if err := addShadow(path.Join(etc, "shadow"), name); err != nil {
		return err
	}
	if err := writeAccounts(path.Join(etc, "group"), group, 0o644); err != nil {
		return err
	}
	if err := writeAccounts(path.Join(etc, "passwd"), append(passwd, user), 0o644); err != nil {
		return err
	}
	return makeHome(strings.Split(user, ":"))
}

// readAccounts gives the lines of a file that may be missing.
func readAccounts(name string) ([]string, error) {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() || fi.Size() > maxAccounts {
		return nil, fmt.Errorf("%s is no file of at most %d bytes", name, maxAccounts)
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	return strings.FieldsFunc(string(text), func(r rune) bool { return r == '\n' || r == '\r' }), nil
}

func writeAccounts(name string, lines []string, mode fs.FileMode) error {
	return writeNew(name, strings.Join(lines, "\n")+"\n", mode)
}

// record gives the fields of a name's line.
func record(lines []string, name string) []string {
	for _, l := range lines {
		if f := strings.Split(l, ":"); f[0] == name {
			return f
		}
	}
	return nil
}

// freeID is the first number that neither a user nor a group has.
func freeID(passwd, group []string) int {
	used := map[string]bool{}
	for _, l := range slices.Concat(passwd, group) {
		if f := strings.Split(l, ":"); len(f) > 2 {
			used[f[2]] = true
		}
	}
	id := firstID
	for used[strconv.Itoa(id)] && id < lastID {
		id++
	}
	return id
}

// addShadow gives the user no password, where passwords are kept.
func addShadow(name, user string) error {
	lines, err := readAccounts(name)
	if err != nil || len(lines) == 0 || record(lines, user) != nil {
		return err
	}
	fi, err := os.Stat(name)
	if err != nil {
		return err
	}
	gid, err := groupOf(fi)
	if err != nil {
		return err
	}
	if err := writeAccounts(name, append(lines, user+":!:19000:0:99999:7:::"), fi.Mode().Perm()); err != nil {
		return err
	}
	return os.Chown(name, 0, gid)
}

// makeHome makes a user's home, with what new users get.
func makeHome(u []string) error {
	if len(u) < 6 || !path.IsAbs(u[5]) {
		return nil
	}
	uid, err1 := strconv.Atoi(u[2])
	gid, err2 := strconv.Atoi(u[3])
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("the image's user %s has no number: %w", u[0], err)
	}
	home := path.Clean(u[5])
	if _, err := os.Lstat(home); err == nil {
		return nil
	}
	if err := os.MkdirAll(home, 0o755); err != nil {
		return err
	}
	skel, err := os.ReadDir("/etc/skel")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range skel {
		if !e.Type().IsRegular() {
			continue
		}
		text, err := os.ReadFile("/etc/skel/" + e.Name())
		if err != nil {
			return err
		}
		to := path.Join(home, e.Name())
		if err := errors.Join(os.WriteFile(to, text, 0o644), os.Chown(to, uid, gid)); err != nil {
			return err
		}
	}
	return os.Chown(home, uid, gid)
}
