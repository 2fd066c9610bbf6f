package hostnet

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	tableName   = "wrenn"
	ingressName = "guest"
	egressName  = "egress"
)

// rule is a list of expressions; the helpers below make the usual matches.
type rule []expr.Any

func match(parts ...rule) rule {
	var r rule
	for _, p := range parts {
		r = append(r, p...)
	}
	return r
}

func cmpEq(b []byte) expr.Any  { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: b} }
func cmpNeq(b []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: b} }

func meta(k expr.MetaKey, b []byte) rule {
	return rule{&expr.Meta{Key: k, Register: 1}, cmpEq(b)}
}

func iif(name string) rule { return meta(expr.MetaKeyIIFNAME, ifname(name)) }
func oif(name string) rule { return meta(expr.MetaKeyOIFNAME, ifname(name)) }

// A comparison without the terminating zeros matches the beginning: wrn*.
func iifPrefix(p string) rule { return meta(expr.MetaKeyIIFNAME, []byte(p)) }
func oifPrefix(p string) rule { return meta(expr.MetaKeyOIFNAME, []byte(p)) }

func isIPv4() rule { return meta(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV4}) }

func etherType(t uint16) rule {
	return meta(expr.MetaKeyPROTOCOL, binary.BigEndian.AppendUint16(nil, t))
}

func load(base expr.PayloadBase, off, n uint32) expr.Any {
	return &expr.Payload{DestRegister: 1, Base: base, Offset: off, Len: n}
}

func payload(base expr.PayloadBase, off uint32, want []byte) rule {
	return rule{load(base, off, uint32(len(want))), cmpEq(want)}
}

func saddr(a netip.Addr) rule { return payload(expr.PayloadBaseNetworkHeader, 12, a.AsSlice()) }

func daddrIn(s *nftables.Set) rule {
	return rule{load(expr.PayloadBaseNetworkHeader, 16, 4),
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID}}
}

func ctState(bits uint32) rule { return ctAny(expr.CtKeySTATE, bits) }

// ctAny matches where any of the bits of what is tracked is set.
func ctAny(key expr.CtKey, bits uint32) rule {
	return rule{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		cmpNeq(make([]byte, 4)),
	}
}

func established() rule { return ctState(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED) }

func accept() rule { return rule{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() rule   { return rule{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}} }
func jump(chain string) rule {
	return rule{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

func ifname(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

// replaceTable makes the next flush drop t with all it holds and start it
// anew, in one transaction: no packet sees the state in between.
func replaceTable(c *nftables.Conn, t *nftables.Table) {
	c.AddTable(t) // deleting a missing table would be an error
	c.DelTable(t)
	c.AddTable(t)
}

func addRules(c *nftables.Conn, ch *nftables.Chain, rules ...rule) {
	for _, r := range rules {
		c.AddRule(&nftables.Rule{Table: ch.Table, Chain: ch, Exprs: r})
	}
}

func baseChain(c *nftables.Conn, t *nftables.Table, name string, hook *nftables.ChainHook, policy nftables.ChainPolicy) *nftables.Chain {
	return c.AddChain(&nftables.Chain{Name: name, Table: t, Type: nftables.ChainTypeFilter,
		Hooknum: hook, Priority: nftables.ChainPriorityFilter, Policy: &policy})
}

func natChain(c *nftables.Conn, t *nftables.Table) *nftables.Chain {
	return c.AddChain(&nftables.Chain{Name: "postrouting", Table: t, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
}

// addrSet adds a set of prefixes. Its id is unique in the transaction; chosen
// here because the library would count up a variable that it does not guard.
func addrSet(c *nftables.Conn, t *nftables.Table, id uint32, name string, prefixes []netip.Prefix) (*nftables.Set, error) {
	s := &nftables.Set{Table: t, ID: id, Name: name, KeyType: nftables.TypeIPAddr, Interval: true}
	var elems []nftables.SetElement
	for _, r := range ranges(prefixes) {
		elems = append(elems, nftables.SetElement{Key: binary.BigEndian.AppendUint32(nil, uint32(r.first))})
		// The end is the first address behind the range; there is none behind
		// 255.255.255.255, and an open range reaches to it.
		if r.end < 1<<32 {
			elems = append(elems, nftables.SetElement{IntervalEnd: true,
				Key: binary.BigEndian.AppendUint32(nil, uint32(r.end))})
		}
	}
	return s, c.AddSet(s, elems)
}

// addrRange is the addresses from first to before end.
type addrRange struct{ first, end uint64 }

// ranges are what prefixes cover, in order and apart: the kernel takes no
// intervals that overlap.
func ranges(prefixes []netip.Prefix) []addrRange {
	var all []addrRange
	for _, p := range prefixes {
		a := p.Masked().Addr().As4()
		first := uint64(binary.BigEndian.Uint32(a[:]))
		all = append(all, addrRange{first, first + 1<<(32-p.Bits())})
	}
	slices.SortFunc(all, func(a, b addrRange) int { return cmp.Compare(a.first, b.first) })
	var out []addrRange
	for _, r := range all {
		if n := len(out); n > 0 && r.first <= out[n-1].end {
			out[n-1].end = max(out[n-1].end, r.end)
			continue
		}
		out = append(out, r)
	}
	return out
}

// loadSlotRules loads the rules of the calling thread's namespace. A fresh one
// has none to replace, and a transaction that deletes nothing is over without
// waiting for an RCU grace period: 8 of the 14 ms that a slot takes otherwise.
func loadSlotRules(e Egress, fresh bool) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	ingress := &nftables.Table{Name: tableName, Family: nftables.TableFamilyNetdev}
	t := &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
	for _, t := range []*nftables.Table{ingress, t} {
		if fresh {
			c.AddTable(t)
		} else {
			replaceTable(c, t)
		}
	}
	ingressRules(c, ingress)
	private, err := addrSet(c, t, 1, "private", privateRanges)
	if err != nil {
		return fmt.Errorf("set of private ranges: %w", err)
	}
	allow, err := addrSet(c, t, 2, "allow", e.Allow)
	if err != nil {
		return fmt.Errorf("set of allowed ranges: %w", err)
	}
	deny, err := addrSet(c, t, 3, "deny", e.Deny)
	if err != nil {
		return fmt.Errorf("set of denied ranges: %w", err)
	}
	var named *nftables.Set
	// Services of this namespace: there are none but the host's own dials, and
	// the look-up of names where some are allowed.
	input := []rule{match(iif("lo"), accept()), match(established(), accept())}
	if len(e.Names) > 0 {
		if named, err = namedSet(c, t); err != nil {
			return err
		}
		input = append(input, match(iif(TapName), udpPort(dnsPort), accept()))
	}
	egress := c.AddChain(&nftables.Chain{Name: egressName, Table: t})
	addRules(c, egress, egressRules(e, private, allow, named, deny, accept(), drop())...)
	if e.Web != nil {
		input = append(input, match(iif(TapName), tcpPort(webListen), ctStatus(ipsDestNAT), accept()))
		webRules(c, t, e, private, allow, named, deny)
	}
	if len(e.Names) > 0 || e.Web != nil {
		lead(c, t, e)
	}
	addRules(c, baseChain(c, t, "input", nftables.ChainHookInput, nftables.ChainPolicyDrop), append(input, drop())...)

	// Outward every packet passes the egress chain, not only a connection's
	// first: a policy that changes holds for open connections too.
	addRules(c, baseChain(c, t, "forward", nftables.ChainHookForward, nftables.ChainPolicyDrop),
		match(ctState(expr.CtStateBitINVALID), drop()),
		match(iif(TapName), oif(uplinkName), isIPv4(), saddr(GuestAddr), jump(egressName)),
		match(iif(uplinkName), oif(TapName), isIPv4(), established(), accept()),
		drop())

	addRules(c, natChain(c, t), match(oif(uplinkName), isIPv4(), rule{&expr.Masq{}}))
	if err := c.Flush(); err != nil {
		return fmt.Errorf("load the slot's nftables rules: %w", err)
	}
	return nil
}

// ingressRules see a guest's frames before anything else does. What is left of
// them is IPv4 and ARP from the one address and MAC the guest has: no IPv6, no
// VLANs, no other protocol reaches the host's code.
func ingressRules(c *nftables.Conn, t *nftables.Table) {
	policy := nftables.ChainPolicyDrop
	ch := c.AddChain(&nftables.Chain{Name: ingressName, Table: t, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookIngress, Priority: nftables.ChainPriorityFilter,
		Policy: &policy, Device: TapName})
	const ll, nh = expr.PayloadBaseLLHeader, expr.PayloadBaseNetworkHeader
	ethSource := payload(ll, 6, guestMAC)
	addRules(c, ch,
		match(ethSource, etherType(unix.ETH_P_IP), saddr(GuestAddr), accept()),
		match(ethSource, etherType(unix.ETH_P_ARP),
			payload(nh, 8, guestMAC), payload(nh, 14, GuestAddr.AsSlice()), accept()),
		drop())
}

// egressRules do yes with what the guest may reach and no with what it may not:
// what is private first, whatever the lists say.
func egressRules(e Egress, private, allow, named, deny *nftables.Set, yes, no rule) []rule {
	rules := []rule{
		match(daddrIn(private), no),
		match(daddrIn(allow), yes),
	}
	if named != nil {
		rules = append(rules, match(daddrIn(named), keepNamed(named), yes))
	}
	rules = append(rules, match(daddrIn(deny), no))
	if e.AllowInternet {
		return append(rules, yes)
	}
	return append(rules, no)
}

// forwardMark tells the NAT chain, which does not see the incoming interface,
// that a packet came from a slot. It is set only on packets from our own
// links, so pools with different prefixes share one table.
const forwardMark = 0x77720000

const hostChains = 3

func hostTable() *nftables.Table {
	return &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
}

// loadHostRules replaces the host's table.
func loadHostRules() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	t := hostTable()
	replaceTable(c, t)
	mark := binaryutil.NativeEndian.PutUint32(forwardMark)

	// All of the host's addresses, public ones too, end in this hook.
	addRules(c, baseChain(c, t, "input", nftables.ChainHookInput, nftables.ChainPolicyAccept),
		match(iifPrefix(hostPrefix), established(), accept()),
		match(iifPrefix(hostPrefix), drop()))

	addRules(c, baseChain(c, t, "forward", nftables.ChainHookForward, nftables.ChainPolicyAccept),
		match(iifPrefix(hostPrefix), oifPrefix(hostPrefix), drop()),
		match(iifPrefix(hostPrefix), isIPv4(),
			rule{&expr.Immediate{Register: 1, Data: mark},
				&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1}}, accept()),
		match(iifPrefix(hostPrefix), drop()),
		match(oifPrefix(hostPrefix), established(), accept()),
		match(oifPrefix(hostPrefix), drop()))

	addRules(c, natChain(c, t), match(meta(expr.MetaKeyMARK, mark), rule{&expr.Masq{}}))
	if err := c.Flush(); err != nil {
		return fmt.Errorf("load the host's nftables rules: %w", err)
	}
	return nil
}

// hostRulesLoaded tells whether the host's table is there. Flushed rules are
// the case that happens; a table edited by hand is the administrator's.
func hostRulesLoaded() (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("open nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list nftables tables: %w", err)
	}
	for _, t := range tables {
		if t.Name == tableName {
			return t.Use >= hostChains, nil
		}
	}
	return false, nil
}

func removeHostRules() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	t := hostTable()
	c.AddTable(t)
	c.DelTable(t)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("remove the host's nftables table: %w", err)
	}
	return nil
}

// foreignDrops names the forward chains of others that drop by policy, as
// Docker's does. An accept in our table does not overrule them.
func foreignDrops() ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	var out []string
	for _, ch := range chains {
		f := ch.Table.Family
		if (f == nftables.TableFamilyIPv4 || f == nftables.TableFamilyINet) &&
			ch.Hooknum != nil && *ch.Hooknum == *nftables.ChainHookForward &&
			ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop {
			out = append(out, ch.Table.Name+" "+ch.Name)
		}
	}
	return out, nil
}
