package hostnet

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	// webListen is where this process takes a guest's web connections, in the
	// slot's namespace.
	webListen = 15080
	webName   = "web"
	// ipsDestNAT is IPS_DST_NAT of linux/netfilter: the destination was changed.
	ipsDestNAT = 1 << 5
)

func tcpPort(port uint16) rule {
	return match(isIPv4(), meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_TCP}),
		payload(expr.PayloadBaseTransportHeader, 2, binary.BigEndian.AppendUint16(nil, port)))
}

func ctStatus(bits uint32) rule { return ctAny(expr.CtKeySTATUS, bits) }

// lead sends what is for this process to it.
func lead(c *nftables.Conn, t *nftables.Table, e Egress) {
	ch := asideChain(c, t)
	if len(e.Names) > 0 {
		addRules(c, ch, match(iif(TapName), udpPort(dnsPort), rule{&expr.Redir{}}))
	}
	if e.Web != nil {
		for _, port := range WebPorts {
			addRules(c, ch, match(iif(TapName), tcpPort(port), jump(webName)))
		}
	}
}

// webRules: of the connections to the web's ports those are taken that the guest
// may make; what this process sends on in its place keeps to the same rules.
func webRules(c *nftables.Conn, t *nftables.Table, e Egress, private, allow, named, deny *nftables.Set) {
	take := rule{&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, webListen)},
		&expr.Redir{RegisterProtoMin: 1}}
	leave := rule{&expr.Verdict{Kind: expr.VerdictReturn}}
	web := c.AddChain(&nftables.Chain{Name: webName, Table: t})
	addRules(c, web, egressRules(e, private, allow, named, deny, take, leave)...)
	addRules(c, baseChain(c, t, "output", nftables.ChainHookOutput, nftables.ChainPolicyAccept),
		match(oif(uplinkName), isIPv4(), jump(egressName)),
		match(oif(uplinkName), drop()))
}
