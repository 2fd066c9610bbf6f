package hostnet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// A guest that may reach names asks us for them, whatever name server it
// means: its queries end at this resolver, and what it answers is what opens
// the way. A guest can so reach neither an address that no allowed name has,
// nor anybody by queries for other names. Names are of addresses, not of
// services: who shares an address with an allowed name is reached too.
const (
	dnsPort = 53
	// maxLookups are under way at a time for one guest; further queries are
	// dropped, and the guest asks again.
	maxLookups = 16
	lookupWait = 5 * time.Second
	// maxAnswer bounds the addresses of one answer: it stays below 512 bytes.
	maxAnswer = 16
	// answerTTL is how long a guest may rely on an answer, in seconds.
	answerTTL = 30
	// namedLife is how long an address stays open that the guest neither asks
	// for again nor sends to; far above answerTTL, for programs that keep one.
	namedLife = time.Hour
	// namedAgain is when an answer makes an address's time begin anew.
	namedAgain = time.Minute
	// maxNamed bounds a slot's open addresses.
	maxNamed = 4096
)

var nameRE = regexp.MustCompile(`^(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidName tells whether s is a name as Egress wants it: of a host, or "*."
// and a name for all below it; in lower case and without a dot at the end.
func ValidName(s string) bool { return len(s) <= 253 && nameRE.MatchString(s) }

// resolver answers one guest's queries.
type resolver struct {
	slot   *Slot
	conn   net.PacketConn
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	turns  chan struct{}

	mu    sync.Mutex
	names []string

	// open are the addresses let through, and since when. Held for writing or
	// changing: slot.mu, so that it agrees with the rules.
	openMu sync.Mutex
	open   map[netip.Addr]time.Time
}

// newResolver starts one that allows nothing yet. Held: mu.
func (s *Slot) newResolver() (*resolver, error) {
	r := &resolver{slot: s, turns: make(chan struct{}, maxLookups), open: map[netip.Addr]time.Time{}}
	err := inNetns(s.pool.home, s.ns, func() (err error) {
		r.conn, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(GatewayAddr, dnsPort)))
		return err
	})
	if err != nil {
		return nil, err
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.wg.Go(r.serve)
	return r, nil
}

// allow replaces the names; the rules are about to be loaded anew, with none
// of their addresses. Held: slot.mu.
func (r *resolver) allow(names []string) {
	if r == nil {
		return
	}
	r.mu.Lock()
	r.names = slices.Clone(names)
	r.mu.Unlock()
	r.openMu.Lock()
	clear(r.open)
	r.openMu.Unlock()
}

// close ends the answering. Not held: slot.mu.
func (r *resolver) close() {
	if r == nil {
		return
	}
	r.cancel()
	r.conn.Close()
	r.wg.Wait()
}

func (r *resolver) allowed(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.names {
		if n == name {
			return true
		}
		if below, ok := strings.CutPrefix(n, "*"); ok && len(name) > len(below) && strings.HasSuffix(name, below) {
			return true
		}
	}
	return false
}

func (r *resolver) serve() {
	buf := make([]byte, 1500)
	for {
		n, from, err := r.conn.ReadFrom(buf)
		if err != nil {
			if r.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error of an earlier answer
		}
		h, q, ok := parseQuery(buf[:n])
		if !ok {
			continue
		}
		reply := func(addrs []netip.Addr) {
			if b := packAnswer(h, q, addrs); b != nil {
				_, _ = r.conn.WriteTo(b, from) // a guest that has gone needs none
			}
		}
		name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
		if h.RCode = r.judge(h, q, name); h.RCode != dnsmessage.RCodeSuccess || q.Type != dnsmessage.TypeA {
			reply(nil)
			continue
		}
		select {
		case r.turns <- struct{}{}:
		default:
			continue
		}
		r.wg.Go(func() {
			defer func() { <-r.turns }()
			var addrs []netip.Addr
			addrs, h.RCode = r.resolve(name)
			reply(addrs)
		})
	}
}

// parseQuery reads a query and makes the header of its answer; false for what
// is none.
func parseQuery(b []byte) (dnsmessage.Header, dnsmessage.Question, bool) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || h.Response || !plainName(b[headerLen:]) {
		return h, dnsmessage.Question{}, false
	}
	q, err := p.Question()
	return dnsmessage.Header{ID: h.ID, Response: true, OpCode: h.OpCode,
		RecursionDesired: h.RecursionDesired, RecursionAvailable: true}, q, err == nil
}

// headerLen is the length of a message's header; the question follows.
const headerLen = 12

// plainName says whether a name stands there whole. A pointer in a query's
// name can lead to its header only, and would have the answer be longer.
func plainName(b []byte) bool {
	for len(b) > 0 && b[0] != 0 {
		n := int(b[0])
		if n > 63 || n >= len(b) {
			return false
		}
		b = b[1+n:]
	}
	return len(b) > 0
}

// judge says what becomes of a query; of those that succeed the ones for IPv4
// addresses are looked up, and there is nothing else.
func (r *resolver) judge(h dnsmessage.Header, q dnsmessage.Question, name string) dnsmessage.RCode {
	switch {
	case h.OpCode != 0 || q.Class != dnsmessage.ClassINET:
		return dnsmessage.RCodeNotImplemented
	case !r.allowed(name):
		return dnsmessage.RCodeRefused
	}
	return dnsmessage.RCodeSuccess
}

// resolve finds a name's addresses and lets the guest reach them.
func (r *resolver) resolve(name string) ([]netip.Addr, dnsmessage.RCode) {
	ctx, cancel := context.WithTimeout(r.ctx, lookupWait)
	defer cancel()
	addrs, err := r.slot.pool.publicAddrs(ctx, name)
	var de *net.DNSError
	switch {
	case errors.As(err, &de) && de.IsNotFound:
		return nil, dnsmessage.RCodeNameError
	case err != nil:
		r.slot.pool.log.Debug("look up a name for a guest", "slot", r.slot.Index, "name", name, "error", err)
		return nil, dnsmessage.RCodeServerFailure
	}
	if err := r.admit(name, addrs); err != nil {
		r.slot.pool.log.Warn("let a guest reach a name", "slot", r.slot.Index, "name", name, "error", err)
		return nil, dnsmessage.RCodeServerFailure
	}
	return addrs, dnsmessage.RCodeSuccess
}

// publicAddrs looks a name up. What is private stays so, and is not told either.
func (p *Pool) publicAddrs(ctx context.Context, name string) ([]netip.Addr, error) {
	addrs, err := p.lookup(ctx, name)
	addrs = slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return !a.Is4() || isPrivate(a) })
	return addrs[:min(len(addrs), maxAnswer)], err
}

var errTooMany = errors.New("too many addresses are open already")

// admit opens the way to addresses, unless the name was taken away meanwhile.
func (r *resolver) admit(name string, addrs []netip.Addr) error {
	return r.slot.in(func() error {
		if !r.allowed(name) {
			return errors.New("it is not allowed any more")
		}
		r.openMu.Lock()
		defer r.openMu.Unlock()
		now := time.Now()
		var add []netip.Addr
		for _, a := range addrs {
			if at, ok := r.open[a]; !ok || now.Sub(at) > namedAgain {
				add = append(add, a)
			}
		}
		if len(add) == 0 {
			return nil
		}
		for a, at := range r.open { // those that have ended, unless they were used
			if len(r.open)+len(add) > maxNamed && now.Sub(at) > namedLife {
				delete(r.open, a)
			}
		}
		if len(r.open)+len(add) > maxNamed {
			return errTooMany
		}
		if err := openNamed(add); err != nil {
			return err
		}
		for _, a := range add {
			r.open[a] = now
		}
		return nil
	})
}

func packAnswer(h dnsmessage.Header, q dnsmessage.Question, addrs []netip.Addr) []byte {
	b := dnsmessage.NewBuilder(nil, h)
	b.EnableCompression()
	err := errors.Join(b.StartQuestions(), b.Question(q), b.StartAnswers())
	for _, a := range addrs {
		err = errors.Join(err, b.AResource(dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: answerTTL}, dnsmessage.AResource{A: a.As4()}))
	}
	text, err2 := b.Finish()
	if errors.Join(err, err2) != nil {
		return nil
	}
	return text
}

// lookupAsHost asks the host's name servers, for the name as it stands.
func lookupAsHost(ctx context.Context, name string) ([]netip.Addr, error) {
	addrs, err := (&net.Resolver{PreferGo: true}).LookupNetIP(ctx, "ip4", name+".")
	for i, a := range addrs {
		addrs[i] = a.Unmap()
	}
	return addrs, err
}
