package hostnet

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	namedName = "named"
	dynUpdate = 1 // NFT_DYNSET_OP_UPDATE
)

// namedSet adds the set of addresses that allowed names have; each leaves it
// after namedLife without use.
func namedSet(c *nftables.Conn, t *nftables.Table) (*nftables.Set, error) {
	s := &nftables.Set{Table: t, ID: 4, Name: namedName, KeyType: nftables.TypeIPAddr,
		Dynamic: true, HasTimeout: true, Timeout: namedLife, Size: maxNamed}
	if err := c.AddSet(s, nil); err != nil {
		return nil, fmt.Errorf("set of named addresses: %w", err)
	}
	return s, nil
}

// keepNamed makes the time of a destination in the set begin anew: a
// connection lives for as long as it is used.
func keepNamed(s *nftables.Set) rule {
	return rule{load(expr.PayloadBaseNetworkHeader, 16, 4),
		&expr.Dynset{SrcRegKey: 1, SetName: s.Name, SetID: s.ID, Operation: dynUpdate, Timeout: namedLife}}
}

func udpPort(port uint16) rule {
	return match(isIPv4(), meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_UDP}),
		payload(expr.PayloadBaseTransportHeader, 2, binary.BigEndian.AppendUint16(nil, port)))
}

// asideChain is where a guest's packets are led to this process instead of on.
func asideChain(c *nftables.Conn, t *nftables.Table) *nftables.Chain {
	return c.AddChain(&nftables.Chain{Name: "prerouting", Table: t, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest})
}

// openNamed puts addresses into the set of the calling thread's namespace,
// with their whole time before them.
func openNamed(addrs []netip.Addr) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	s := &nftables.Set{Table: hostTable(), Name: namedName, KeyType: nftables.TypeIPAddr, Dynamic: true, HasTimeout: true}
	var elems []nftables.SetElement
	for _, a := range addrs {
		elems = append(elems, nftables.SetElement{Key: a.AsSlice(), Timeout: namedLife})
	}
	// One that is there keeps its time when it is added; one that is not cannot
	// be removed. One transaction, so no packet meets a gap.
	for _, step := range []func(*nftables.Set, []nftables.SetElement) error{c.SetAddElements, c.SetDeleteElements, c.SetAddElements} {
		if err := step(s, elems); err != nil {
			return fmt.Errorf("open addresses: %w", err)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("open addresses: %w", err)
	}
	return nil
}
