package sdk

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// resolver answers every question for a name below the domain with 127.0.0.1.
func resolver(t *testing.T) (addr string) {
	t.Helper()
	// Port 53 of an address of our own: resolv.conf names no ports.
	c, err := net.ListenPacket("udp", fmt.Sprintf("127.%d.%d.2:53", 64+os.Getpid()>>8&63, os.Getpid()&255))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if b, err := answerTo(buf[:n]); err == nil {
				_, _ = c.WriteTo(b, from)
			}
		}
	}()
	host, _, _ := net.SplitHostPort(c.LocalAddr().String())
	return host
}

func answerTo(query []byte) ([]byte, error) {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	h.Response, h.Authoritative, h.RecursionAvailable = true, true, true
	b := dnsmessage.NewBuilder(nil, h)
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if err := b.Question(q); err != nil {
		return nil, err
	}
	if err := b.StartAnswers(); err != nil {
		return nil, err
	}
	if q.Type == dnsmessage.TypeA && strings.HasSuffix(q.Name.String(), domain+".") {
		err := b.AResource(dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}, dnsmessage.AResource{A: [4]byte{127, 0, 0, 1}})
		if err != nil {
			return nil, err
		}
	}
	return b.Finish()
}

// asIfByDNS makes a command that sees a resolver of ours in place of the
// host's, in a mount namespace of its own.
func asIfByDNS(t *testing.T, args ...string) []string {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver "+resolver(t)+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return append([]string{"unshare", "--mount", "/bin/sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, conf}, args...)
}
