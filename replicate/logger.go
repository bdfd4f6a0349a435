package replicate

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// raftRepeats is how often raft may say the same of the same peer: it does at every attempt to reach one that is away.
const raftRepeats = time.Minute

// raftRoutine are what raft warns of whenever a replica catches up.
var raftRoutine = []string{"appendEntries rejected, sending older logs", "failed to get previous log"}

// raftLogger passes raft's messages on. What raft calls info, an operator would call debug; of what it calls a warning or
// an error, repetitions are left out.
type raftLogger struct {
	log  *slog.Logger
	name string
	args []any
	said *raftSaid
}

// raftSaid is when what was said last; bounded by raft's vocabulary and the peers there are.
type raftSaid struct {
	mu   sync.Mutex
	when map[string]time.Time
}

func newRaftLogger(log *slog.Logger) *raftLogger {
	return &raftLogger{log: log, said: &raftSaid{when: map[string]time.Time{}}}
}

// again says whether the same was said a moment ago.
func (r *raftSaid) again(msg string, args []any) bool {
	key := msg
	for i := 0; i+1 < len(args); i += 2 {
		if name, _ := args[i].(string); name == "peer" || name == "server-id" || name == "id" {
			key += fmt.Sprint(" ", args[i+1])
		}
	}
	if r == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if now.Sub(r.when[key]) < raftRepeats {
		return true
	}
	r.when[key] = now
	return false
}

var _ hclog.Logger = (*raftLogger)(nil)

func slogLevel(level hclog.Level) slog.Level {
	switch level {
	case hclog.Error:
		return slog.LevelError
	case hclog.Warn:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// Log is hclog's one way in; the others call it.
func (l *raftLogger) Log(level hclog.Level, msg string, args ...any) {
	ctx := context.Background()
	at := slogLevel(level)
	if at > slog.LevelDebug && (slices.Contains(raftRoutine, msg) || l.said.again(msg, args)) {
		at = slog.LevelDebug
	}
	if level > hclog.Debug && l.log.Enabled(ctx, at) {
		for i, a := range args {
			if f, ok := a.(hclog.Format); ok && len(f) > 0 {
				args[i] = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
			}
		}
		l.log.Log(ctx, at, "raft: "+msg, args...)
	}
}

func (l *raftLogger) Trace(msg string, args ...any) {}
func (l *raftLogger) Debug(msg string, args ...any) {}
func (l *raftLogger) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *raftLogger) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *raftLogger) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *raftLogger) IsTrace() bool { return false }
func (l *raftLogger) IsDebug() bool { return false }
func (l *raftLogger) IsInfo() bool  { return l.log.Enabled(context.Background(), slog.LevelDebug) }
func (l *raftLogger) IsWarn() bool  { return true }
func (l *raftLogger) IsError() bool { return true }

func (l *raftLogger) ImpliedArgs() []any { return l.args }
func (l *raftLogger) Name() string       { return l.name }

func (l *raftLogger) With(args ...any) hclog.Logger {
	return &raftLogger{said: l.said, log: l.log.With(args...), name: l.name, args: append(l.args[:len(l.args):len(l.args)], args...)}
}

func (l *raftLogger) Named(name string) hclog.Logger {
	return &raftLogger{said: l.said, log: l.log, name: name, args: l.args}
}

func (l *raftLogger) ResetNamed(name string) hclog.Logger { return l.Named(name) }
func (l *raftLogger) SetLevel(hclog.Level)                {}
func (l *raftLogger) GetLevel() hclog.Level               { return hclog.Info }

func (l *raftLogger) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return slog.NewLogLogger(l.log.Handler(), slog.LevelDebug)
}

func (l *raftLogger) StandardWriter(o *hclog.StandardLoggerOptions) io.Writer {
	return l.StandardLogger(o).Writer()
}
