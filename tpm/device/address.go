package device

import (
	"fmt"
	"path/filepath"
	"strings"
)

// DefaultAddress is the kernel's resource-managed TPM device.
const DefaultAddress = "/dev/tpmrm0"

// Address names a TPM: a character device, or a swtpm's socket.
type Address struct {
	network string // "device", "unix" or "tcp"
	where   string
}

// ParseAddress reads the form of the setting tpm.device:
//
//	/dev/tpmrm0 | /dev/tpm0 | unix:/path | tcp:host:port
func ParseAddress(s string) (Address, error) {
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if !filepath.IsAbs(path) {
			return Address{}, fmt.Errorf("%q: the socket's path is not absolute; write unix:/path", s)
		}
		return Address{"unix", path}, nil
	}
	if hostPort, ok := strings.CutPrefix(s, "tcp:"); ok {
		if i := strings.LastIndexByte(hostPort, ':'); i <= 0 || i == len(hostPort)-1 {
			return Address{}, fmt.Errorf("%q: want tcp:host:port", s)
		}
		return Address{"tcp", hostPort}, nil
	}
	if !filepath.IsAbs(s) {
		return Address{}, fmt.Errorf("%q is no TPM; want /dev/tpmrm0, unix:/path or tcp:host:port", s)
	}
	return Address{"device", s}, nil
}

// String returns what ParseAddress reads.
func (a Address) String() string {
	if a.network == "device" {
		return a.where
	}
	return a.network + ":" + a.where
}

// managed reports whether a resource manager cleans up after a client that has gone
// away.
func (a Address) managed() bool {
	return a.network == "device" && strings.HasPrefix(filepath.Base(a.where), "tpmrm")
}
