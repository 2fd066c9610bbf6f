package control

import (
	"slices"
	"testing"
)

// DNS servers are open where names are allowed, and only there.
func TestDNSServersBelongToNames(t *testing.T) {
	for _, c := range []struct {
		e    Egress
		want []string
	}{
		{Egress{Allow: []string{"a.example"}, DNSServers: []string{"192.0.2.1"}}, []string{"a.example", "192.0.2.1/32"}},
		{Egress{Allow: []string{"192.0.2.7/32"}, DNSServers: []string{"192.0.2.1"}}, []string{"192.0.2.7/32"}},
		{Egress{DNSServers: []string{"192.0.2.1"}}, nil},
	} {
		if got := c.e.open(); !slices.Equal(got, c.want) {
			t.Errorf("%+v: %v, want %v", c.e, got, c.want)
		}
	}
}
