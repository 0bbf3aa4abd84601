package nodetest

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
)

// Log keeps what is logged. It is a [slog.Handler]; the zero value is ready.
type Log struct {
	mu    sync.Mutex
	lines []string
}

// Lines returns the lines so far: each is the message, then its attributes as key=value.
func (l *Log) Lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.lines)
}

// Count returns the number of lines with a part.
func (l *Log) Count(part string) (n int) {
	for _, line := range l.Lines() {
		if strings.Contains(line, part) {
			n++
		}
	}
	return n
}

// Enabled implements slog.Handler.
func (l *Log) Enabled(context.Context, slog.Level) bool { return true }

// Handle implements slog.Handler.
func (l *Log) Handle(_ context.Context, r slog.Record) error {
	line := r.Message
	r.Attrs(func(a slog.Attr) bool { line += " " + a.String(); return true })
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
	return nil
}

// WithAttrs implements slog.Handler. It drops the attributes.
func (l *Log) WithAttrs([]slog.Attr) slog.Handler { return l }

// WithGroup implements slog.Handler. It drops the group.
func (l *Log) WithGroup(string) slog.Handler { return l }
