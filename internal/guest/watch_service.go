package guest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/filesystem"
)

const (
	// maxWatchers bounds CreateWatcher; the kernel allows 128 instances to one
	// user by default, streams among them.
	maxWatchers = 64
	// maxWatcherEvents bounds what one watcher keeps until it is asked.
	maxWatcherEvents = 16384
)

func (f filesystemService) WatchDir(ctx context.Context, req *connect.Request[pb.WatchDirRequest], stream *connect.ServerStream[pb.WatchDirResponse]) error {
	ping, err := keepalive(req.Header())
	if err != nil {
		return err
	}
	m := req.Msg
	_, path, err := f.resolve(req, "path", m.GetPath())
	if err != nil {
		return err
	}
	w, err := f.s.newWatch(path, m.GetRecursive(), m.GetIncludeEntry(), m.GetAllowNetworkMounts())
	if err != nil {
		return err
	}
	defer w.close()
	start := &pb.WatchDirResponse_Start{Start: &pb.WatchDirResponse_StartEvent{}}
	if err := stream.Send(&pb.WatchDirResponse{Event: start}); err != nil {
		return err
	}
	ticker := time.NewTicker(ping)
	defer ticker.Stop()
	for {
		ev, err := w.next(ctx.Done(), ticker.C)
		if ctx.Err() != nil {
			return contextError(ctx)
		}
		if err != nil {
			return err
		}
		res := &pb.WatchDirResponse{Event: &pb.WatchDirResponse_Filesystem{Filesystem: ev}}
		if ev == nil {
			res.Event = &pb.WatchDirResponse_Keepalive{Keepalive: &pb.WatchDirResponse_KeepAlive{}}
		} else {
			ticker.Reset(ping)
		}
		if err := stream.Send(res); err != nil {
			return err
		}
	}
}

// watchers are those of clients that ask instead of holding a stream.
type watchers struct {
	mu   sync.Mutex
	byID map[string]*watcher
}

type watcher struct {
	watch *watch
	mu    sync.Mutex
	// events wait for the client; err ended the watch and is told after them.
	events []*pb.FilesystemEvent
	err    error
}

func newWatchers() *watchers { return &watchers{byID: map[string]*watcher{}} }

func (ws *watchers) closeAll() {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for id, w := range ws.byID {
		w.watch.close()
		delete(ws.byID, id)
	}
}

// collect keeps a watch's events until it ends.
func (w *watcher) collect() {
	for {
		ev, err := w.watch.next(nil, nil)
		w.mu.Lock()
		if err == nil && len(w.events) == maxWatcherEvents {
			err = connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("more than %d events were not fetched, and later ones are lost", maxWatcherEvents))
			w.watch.close()
		}
		if err != nil {
			w.err = err
			w.mu.Unlock()
			return
		}
		w.events = append(w.events, ev)
		w.mu.Unlock()
	}
}

func (f filesystemService) CreateWatcher(_ context.Context, req *connect.Request[pb.CreateWatcherRequest]) (*connect.Response[pb.CreateWatcherResponse], error) {
	m := req.Msg
	_, path, err := f.resolve(req, "path", m.GetPath())
	if err != nil {
		return nil, err
	}
	wt, err := f.s.newWatch(path, m.GetRecursive(), m.GetIncludeEntry(), m.GetAllowNetworkMounts())
	if err != nil {
		return nil, err
	}
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	id := hex.EncodeToString(b[:])
	ws := f.s.watchers
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if len(ws.byID) >= maxWatchers {
		wt.close()
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("there are %d watchers already", maxWatchers))
	}
	w := &watcher{watch: wt}
	ws.byID[id] = w
	go w.collect()
	return connect.NewResponse(&pb.CreateWatcherResponse{WatcherId: id}), nil
}

func (ws *watchers) find(id string) (*watcher, error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if w, ok := ws.byID[id]; ok {
		return w, nil
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("watcher '%s' not found", clip(id)))
}

func (f filesystemService) GetWatcherEvents(_ context.Context, req *connect.Request[pb.GetWatcherEventsRequest]) (*connect.Response[pb.GetWatcherEventsResponse], error) {
	w, err := f.s.watchers.find(req.Msg.GetWatcherId())
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.events) == 0 && w.err != nil {
		return nil, w.err
	}
	res := &pb.GetWatcherEventsResponse{Events: w.events}
	w.events = nil
	return connect.NewResponse(res), nil
}

func (f filesystemService) RemoveWatcher(_ context.Context, req *connect.Request[pb.RemoveWatcherRequest]) (*connect.Response[pb.RemoveWatcherResponse], error) {
	ws := f.s.watchers
	ws.mu.Lock()
	w, ok := ws.byID[req.Msg.GetWatcherId()]
	delete(ws.byID, req.Msg.GetWatcherId())
	ws.mu.Unlock()
	if !ok {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("watcher not found"))
	}
	w.watch.close()
	return connect.NewResponse(&pb.RemoveWatcherResponse{}), nil
}
