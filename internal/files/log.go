package files

import (
	"encoding/json"
	"errors"
	"os"
	"sync"
)

// Log is an audit log. It is opened for each line, so it may be moved away at any time.
type Log struct {
	Path string

	mu     sync.Mutex
	failed error // of the last attempt
}

// Append returns once the lines are on the disk. If they do not fit, it removes them
// again.
func (l *Log) Append(lines []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = l.write(lines, keep)
	return l.failed
}

// Failing returns the reason why the last lines could not be written, if writing still
// fails: it tries with an empty line, and removes it again.
func (l *Log) Failing() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed != nil {
		l.failed = l.write([]byte("\n"), takeBack)
	}
	return l.failed
}

// write appends lines, which finish then keeps or takes back.
func (l *Log) write(lines []byte, finish func(file *os.File, former int64) error) error {
	file, err := os.OpenFile(l.Path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if _, err := file.Write(lines); err != nil {
		return errors.Join(err, file.Truncate(info.Size()))
	}
	return errors.Join(file.Sync(), SyncFolder(l.Path), finish(file, info.Size()))
}

func keep(*os.File, int64) error { return nil }

func takeBack(file *os.File, former int64) error { return file.Truncate(former) }

// AppendJSON appends each record as a line.
func AppendJSON[T any](l *Log, records []T) error {
	var lines []byte
	for _, r := range records {
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		lines = append(append(lines, line...), '\n')
	}
	return l.Append(lines)
}
