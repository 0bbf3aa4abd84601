// Package disk finds a test machine's disks, and transfers files on them.
package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Open opens the disk with this serial number. The kernel may still be looking for its
// disks; on a busy host it has five minutes.
func Open(serial string, flag int) (*os.File, error) {
	deadline := time.NewTimer(5 * time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		device, err := find(serial)
		if err == nil {
			return os.OpenFile(device, flag, 0)
		}
		select {
		case <-deadline.C:
			return nil, err
		case <-tick.C:
		}
	}
}

func find(serial string) (string, error) {
	files, err := filepath.Glob("/sys/block/*/serial")
	if err != nil {
		return "", err
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		device := "/dev/" + filepath.Base(filepath.Dir(file))
		if err == nil && strings.TrimSpace(string(b)) == serial {
			if _, err := os.Stat(device); err == nil {
				return device, nil
			}
		}
	}
	return "", fmt.Errorf("there is no disk %s", serial)
}
