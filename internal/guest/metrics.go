package guest

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
)

// metrics is the answer of GET /metrics. Sizes are bytes.
type metrics struct {
	Timestamp  int64   `json:"ts"` // Unix seconds
	CPUCount   int     `json:"cpu_count"`
	CPUUsedPct float64 `json:"cpu_used_pct"` // of all processors, since the call before
	MemTotal   uint64  `json:"mem_total"`
	MemUsed    uint64  `json:"mem_used"` // neither free nor cache
	MemCache   uint64  `json:"mem_cache"`
	DiskUsed   uint64  `json:"disk_used"`
	DiskTotal  uint64  `json:"disk_total"`
}

// meter remembers the processors' time at the last call; at the first one the
// share is since boot.
type meter struct {
	mu          sync.Mutex
	busy, total uint64
	pct         float64
}

func (s *Server) handleMetrics(w http.ResponseWriter, _ *http.Request) {
	m, err := s.measure()
	if err != nil {
		writeError(w, connect.NewError(connect.CodeInternal, err))
		return
	}
	writeJSON(w, http.StatusOK, m)
}

func (s *Server) measure() (*metrics, error) {
	m := &metrics{Timestamp: s.opt.Now().Unix(), CPUCount: runtime.NumCPU()}
	var err error
	if m.CPUUsedPct, err = s.meter.sample(); err != nil {
		return nil, err
	}
	mem, err := meminfo()
	if err != nil {
		return nil, err
	}
	m.MemTotal = mem["MemTotal"]
	m.MemCache = mem["Cached"] + mem["Buffers"] + mem["SReclaimable"]
	if free := mem["MemFree"] + m.MemCache; free < m.MemTotal {
		m.MemUsed = m.MemTotal - free
	}
	var fs unix.Statfs_t
	if err := unix.Statfs("/", &fs); err != nil {
		return nil, fmt.Errorf("measuring the disk: %w", err)
	}
	m.DiskTotal = fs.Blocks * uint64(fs.Bsize)
	m.DiskUsed = (fs.Blocks - fs.Bfree) * uint64(fs.Bsize)
	return m, nil
}

func (m *meter) sample() (float64, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, fmt.Errorf("measuring the processors: %w", err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	f := strings.Fields(line)
	if len(f) < 8 || f[0] != "cpu" {
		return 0, fmt.Errorf("measuring the processors: unexpected line %q", clip(line))
	}
	var busy, total uint64
	// user nice system idle iowait irq softirq steal; guest times are within
	// user and nice.
	for i, v := range f[1:min(len(f), 9)] {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("measuring the processors: %w", err)
		}
		total += n
		if i != 3 && i != 4 {
			busy += n
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// Two calls within one tick see no time pass: the last share stands.
	if total > m.total && busy >= m.busy {
		m.pct = 100 * float64(busy-m.busy) / float64(total-m.total)
		m.busy, m.total = busy, total
	}
	return m.pct, nil
}

// meminfo is /proc/meminfo in bytes.
func meminfo() (map[string]uint64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return nil, fmt.Errorf("measuring the memory: %w", err)
	}
	defer f.Close()
	m := map[string]uint64{}
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		name, rest, ok := strings.Cut(sc.Text(), ":")
		v := strings.Fields(rest)
		if !ok || len(v) == 0 {
			continue
		}
		if n, err := strconv.ParseUint(v[0], 10, 64); err == nil {
			m[name] = n << 10
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("measuring the memory: %w", err)
	}
	return m, nil
}
