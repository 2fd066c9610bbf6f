package e2e

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
)

// reach is a Python program that says for each address whether something
// answered there, by TCP ("open", "refused") or not at all ("none").
const reach = `
import socket, sys, concurrent.futures
def probe(target):
    host, port = target.rsplit(":", 1)
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    s.settimeout(2)
    try:
        s.connect((host.strip("[]"), int(port)))
        return "open"
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        return "none"
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    for target, found in zip(sys.argv[1:], pool.map(probe, sys.argv[1:])):
        print(target, found)
`

func TestGuestsReachNothingPrivate(t *testing.T) {
	s := server(t)
	a, b := spawn(t, s), spawn(t, s)
	// A real listener on every address of the host: what is reached is seen.
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	reached := make(chan string, 64)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // the test is over
			}
			reached <- c.RemoteAddr().String()
			c.Close()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	var targets []string
	add := func(host string, port int) { targets = append(targets, fmt.Sprintf("%s:%d", host, port)) }
	for _, host := range hostAddresses(t) {
		add(host, port)
		add(host, 22)
		add(host, 49983) // another sandbox's agent, if it were published so
	}
	for _, host := range []string{
		"169.254.169.254", "169.254.170.2", "100.100.100.200", "10.0.0.1", "10.213.0.1", "10.213.0.2", "10.213.0.5", "10.213.0.6",
		"172.16.0.1", "172.17.0.1", "192.168.0.1", "192.168.1.1", "100.64.0.1",
	} {
		add(host, port)
		add(host, 80)
		add(host, 49983)
	}
	add("172.30.0.1", port) // its gateway is the host's end of its own link
	add("172.30.0.1", 22)
	r, err := s.Exec(timeout(t, 2*time.Minute), a.ID, client.ExecRequest{
		Cmd: "python3", Args: append([]string{"-c", reach}, targets...), TimeoutSec: 90,
	})
	if err != nil || r.ExitCode != 0 {
		t.Fatalf("probe: %v %+v", err, r)
	}
	lines := strings.Split(strings.TrimSpace(string(r.Stdout)), "\n")
	if len(lines) != len(targets) {
		t.Fatalf("%d answers to %d probes", len(lines), len(targets))
	}
	for _, line := range lines {
		if strings.HasSuffix(line, " open") {
			t.Errorf("a guest reached %s", line)
		}
	}
	select {
	case from := <-reached:
		t.Errorf("a guest reached the host's listener from %s", from)
	default:
	}
	// The probe itself finds what is there.
	if out := sh(t, s, a.ID, "python3 -c '"+reach+"' 127.0.0.1:49983"); !strings.HasSuffix(out, " open") {
		t.Errorf("the probe does not even find the guest's own agent: %s", out)
	}
	sh(t, s, b.ID, "true")
}

// hostAddresses are all addresses of this host, loopback left out.
func hostAddresses(t *testing.T) []string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLoopback() && n.IP.To4() != nil {
			out = append(out, n.IP.String())
		}
	}
	return out
}

func TestTheHostReachesAgentsOnlyThroughUs(t *testing.T) {
	s := server(t)
	spawn(t, s)
	// Neither the guest's own address nor its link's leads to the agent from
	// the host's network.
	for _, host := range append([]string{"172.30.0.2", "10.213.0.2", "10.213.0.6", "10.213.0.10"}, hostAddresses(t)...) {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(host, "49983"), 500*time.Millisecond)
		if err == nil {
			c.Close()
			t.Errorf("an agent answers at %s:49983", host)
		}
	}
}

func TestAProcessInTheGuestCannotSpeakToItsAgentAsTheHost(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	out := sh(t, s, sb.ID, `curl -s -o /dev/null -w '%{http_code}' -X POST -d '{"generation":"x"}' http://127.0.0.1:49983/init; echo
		curl -s -o /dev/null -w '%{http_code}' -X POST -d '{"generation":"x"}' http://172.30.0.2:49983/init; echo
		curl -s -o /dev/null -w '%{http_code}' 'http://127.0.0.1:49983/files?path=/etc/passwd&username=root'`)
	for _, code := range strings.Fields(out) {
		if code != "401" && code != "403" && code != "404" {
			t.Errorf("a process in the guest gets %q from its agent", out)
			break
		}
	}
	if who := identityOf(t, s, sb.ID); who.generation == "x" {
		t.Error("a process in the guest has renewed it")
	}
}
