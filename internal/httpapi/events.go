package httpapi

import (
	"math"
	"net/http"
	"strconv"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

type eventBody struct {
	Seq        int64             `json:"seq"`
	At         time.Time         `json:"at"`
	Type       control.EventType `json:"type"`
	Status     control.Status    `json:"status"`
	DurationMS int64             `json:"duration_ms"`
	Detail     string            `json:"detail,omitempty"`
	Error      string            `json:"error,omitempty"`
	RequestID  string            `json:"request_id,omitempty"`
}

func (a *api) listEvents(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	q, err := query(r, "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := pageSize(q)
	if err != nil {
		return err
	}
	var after int64
	if q.Has("cursor") {
		text, err := parseCursor(q.Get("cursor"))
		if err != nil {
			return err
		}
		if after, err = strconv.ParseInt(text, 10, 64); err != nil || after < 0 || after == math.MaxInt64 {
			return badCursor
		}
	}
	list, err := a.svc.Events(r.Context(), id, after, limit)
	if err != nil {
		return err
	}
	out := struct {
		Events     []eventBody `json:"events"`
		NextCursor string      `json:"next_cursor"`
	}{Events: []eventBody{}}
	for _, e := range list {
		out.Events = append(out.Events, eventBody{
			Seq: e.Seq, At: e.At, Type: e.Type, Status: e.Status, DurationMS: e.Duration.Milliseconds(),
			Detail: e.Detail, Error: e.Error, RequestID: e.RequestID,
		})
		after = e.Seq
	}
	// Always there: what happens later is asked for with it.
	out.NextCursor = cursorString(strconv.FormatInt(after, 10))
	return reply(w, http.StatusOK, out)
}
