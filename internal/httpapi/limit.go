package httpapi

import (
	"fmt"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// Limits bound what one API key may ask for. Zero fields are the defaults,
// which one person or one busy program does not reach; negative ones are no
// limit.
type Limits struct {
	// PerSecond requests in the long run, and Burst at once.
	PerSecond float64
	Burst     int
	// Concurrent requests under way, streams and transfers included.
	Concurrent int
}

// DefaultLimits are used where Limits has zeros.
var DefaultLimits = Limits{PerSecond: 1000, Burst: 2000, Concurrent: 1000}

func (l Limits) withDefaults() Limits {
	if l.PerSecond == 0 {
		l.PerSecond = DefaultLimits.PerSecond
	}
	if l.Burst == 0 {
		l.Burst = DefaultLimits.Burst
	}
	if l.Concurrent == 0 {
		l.Concurrent = DefaultLimits.Concurrent
	}
	if l.PerSecond < 0 {
		l.PerSecond, l.Burst = math.Inf(1), 1
	}
	return l
}

// Limiter has a bucket for each API key, whichever surface its requests come
// by. Keys are rows of the database, so there are as many as an administrator
// made.
type Limiter struct {
	limits Limits
	now    func() time.Time
	mu     sync.Mutex
	keys   map[string]*keyUse
}

type keyUse struct {
	bucket   *rate.Limiter
	underway int
}

// NewLimiter makes one.
func NewLimiter(l Limits) *Limiter {
	return &Limiter{limits: l.withDefaults(), now: time.Now, keys: map[string]*keyUse{}}
}

// Begin counts a request of the key with this ID in, or refuses it with an
// error that has RetryAfter.
func (l *Limiter) Begin(key string) (end func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.keys[key]
	if u == nil {
		u = &keyUse{bucket: rate.NewLimiter(rate.Limit(l.limits.PerSecond), l.limits.Burst)}
		l.keys[key] = u
	}
	if l.limits.Concurrent > 0 && u.underway >= l.limits.Concurrent {
		return nil, &limitError{time.Second, fmt.Sprintf("this API key has %d requests under way, and that is its limit; wait for some of them to end", u.underway)}
	}
	now := l.now()
	r := u.bucket.ReserveN(now, 1)
	if wait := r.DelayFrom(now); wait > 0 {
		r.CancelAt(now)
		return nil, &limitError{wait, fmt.Sprintf("this API key has sent more than %g requests a second; try again after the time in Retry-After", l.limits.PerSecond)}
	}
	u.underway++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		u.underway--
	}, nil
}

// limitError is a refusal with the time after which to try again.
type limitError struct {
	after   time.Duration
	message string
}

func (e *limitError) Error() string { return e.message }

// RetryAfter is whole seconds, at least one.
func (e *limitError) RetryAfter() string {
	return strconv.Itoa(max(1, int(math.Ceil(e.after.Seconds()))))
}

func (e *limitError) Unwrap() error {
	return &control.Error{Code: control.CodeRateLimited, Message: e.message}
}

func (a *api) limit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		end, err := a.limiter.Begin(apiKeyOf(r))
		if err != nil {
			a.fail(w, r, err)
			return
		}
		defer end()
		next.ServeHTTP(w, r)
	})
}
