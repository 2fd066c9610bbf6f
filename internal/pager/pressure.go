package pager

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
)

// EvictMemory implements pager.v1.
func (s *Server) EvictMemory(_ context.Context, req *connect.Request[pagerv1.EvictMemoryRequest]) (*connect.Response[pagerv1.EvictMemoryResponse], error) {
	if req.Msg.Bytes <= 0 {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("bytes is %d, want more than 0", req.Msg.Bytes))
	}
	n, err := s.evict(req.Msg.Bytes)
	if err != nil {
		return nil, wireError(err)
	}
	return connect.NewResponse(&pagerv1.EvictMemoryResponse{EvictedBytes: n}), nil
}

func (s *Server) evict(n int64) (int64, error) {
	gone, err := s.images.evict(n)
	s.mu.Lock()
	s.totals.evicted += uint64(gone)
	s.mu.Unlock()
	if err != nil {
		return gone, fmt.Errorf("give memory back: %w", err)
	}
	return gone, nil
}

// evict gives about n bytes of images back: those without a user whole, the
// longest unused first, then pages of those in use, the longest in use first.
func (im *images) evict(n int64) (gone int64, err error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	var errs []error
	for gone < n && len(im.warm) > 0 {
		i := im.warm[0]
		im.warm = im.warm[1:]
		gone += i.resident()
		errs = append(errs, im.drop(i))
	}
	var used []*image
	for _, i := range im.byID {
		if i.shared != nil {
			used = append(used, i)
		}
	}
	slices.SortFunc(used, func(a, b *image) int { return cmp.Compare(a.since, b.since) })
	for _, i := range used {
		if gone >= n {
			break
		}
		got, err := i.shared.Evict(n - gone)
		gone += got
		errs = append(errs, err)
	}
	return gone, errors.Join(errs...)
}

// watchMemory keeps Options.LowWater of the host's memory available, as far as
// images can be given back. It looks once a second, until ctx ends.
func (s *Server) watchMemory(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := s.relieve(); err != nil {
				s.log.Error("memory is short", "err", err)
			}
		}
	}
}

// relieve evicts when less than the low-water mark is available, up to twice
// the mark, so that it does not do so again at once.
func (s *Server) relieve() error {
	free, err := s.opts.MemAvailable()
	if err != nil || free >= s.opts.LowWater {
		return err
	}
	n, err := s.evict(2*s.opts.LowWater - free)
	if n > 0 {
		s.log.Warn("memory is short: pages of images were given back", "available", free, "evicted", n)
	}
	return err
}

// memAvailable reads how much memory the host can still give, in bytes.
func memAvailable() (int64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if rest, ok := strings.CutPrefix(sc.Text(), "MemAvailable:"); ok {
			var kib int64
			if _, err := fmt.Sscan(rest, &kib); err != nil {
				return 0, fmt.Errorf("/proc/meminfo: MemAvailable is %q: %w", rest, err)
			}
			return kib << 10, nil
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}
