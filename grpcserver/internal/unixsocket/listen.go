package unixsocket

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// MaxPath bounds Config.Path, in bytes. sun_path holds 108 bytes with the final
// NUL (unix(7)), and the private folder's name takes its share.
const MaxPath = 107 - len("/..new/s") + len("/")

// probeTimeout bounds the wait for an answer on an existing socket.
const probeTimeout = time.Second

// Owner is the owner of a socket; -1 means the process's own user or group.
type Owner struct{ UID, GID int }

// Config is the configuration of a Listener.
type Config struct {
	// Path is absolute, at most MaxPath bytes.
	Path string
	// Setting is the configuration key that Path came from, for messages.
	Setting string
	// Mode holds the socket's permission bits; connecting needs write permission.
	Mode fs.FileMode
	// Owner is nil for the process's own user and group.
	Owner *Owner
	// AllowedUIDs lists the peers that may use the socket.
	AllowedUIDs []uint32
	// AnyPeer admits every peer that the mode lets connect.
	AnyPeer bool
	// Self admits this process itself, and keeps a place for it.
	Self bool
	// Log receives a line when connections are turned away.
	Log *slog.Logger
}

// Listener is a listening socket; Accept returns a [*Conn].
type Listener struct {
	*net.UnixListener
	path  string
	ino   inode
	lock  *os.File
	seats seats
	once  sync.Once
	err   error
}

// Listen makes the socket, with its mode and owner. See the package comment.
func Listen(cfg Config) (*Listener, error) {
	l, err := listen(cfg)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cfg.Setting, err)
	}
	return l, nil
}

func listen(cfg Config) (*Listener, error) {
	if err := checkPath(cfg.Path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(cfg.Path)
	if err := checkFolder(dir); err != nil {
		return nil, err
	}
	if err := checkWritable(dir); err != nil {
		return nil, err
	}
	lock, err := takeLock(beside(cfg.Path, ".lock"))
	if err != nil {
		return nil, err
	}
	if err := checkOccupant(cfg.Path); err != nil {
		lock.Close()
		return nil, err
	}
	ul, ino, err := bind(cfg)
	if err != nil {
		lock.Close()
		return nil, err
	}
	l := &Listener{UnixListener: ul, path: cfg.Path, ino: ino, lock: lock}
	l.seats.init(cfg.AllowedUIDs, cfg.AnyPeer, cfg.Log)
	l.seats.self = cfg.Self
	return l, nil
}

// CheckFolder verifies the folder of a future socket, as Listen does. A missing folder
// is not an error.
func CheckFolder(path, setting string) error {
	err := checkFolder(filepath.Dir(path))
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fmt.Errorf("%s: %w", setting, err)
}

// beside names a hidden file in path's folder.
func beside(path, suffix string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+suffix)
}

func checkPath(path string) error {
	switch {
	case strings.HasPrefix(path, "@") || strings.ContainsRune(path, 0):
		return fmt.Errorf("%q is an abstract socket, which any local user may reach or take; give the path of a file, such as /run/kleidi/kms.sock", path)
	case !filepath.IsAbs(path) || filepath.Clean(path) != path:
		return fmt.Errorf("%q is not a clean absolute path; write it in full, such as /run/kleidi/kms.sock", path)
	case len(path) > MaxPath:
		return fmt.Errorf("%s has %d bytes, and a unix socket's path has room for %d; choose a shorter one", path, len(path), MaxPath)
	}
	return nil
}

// takeLock lets only one of two processes that start at the same time make the socket. It
// does not wait. The file stays after the lock is released: removing it would let two
// processes hold one lock each.
func takeLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock file: %w; remove it if kleidi does not run", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("flock %s: %w; use a folder on a local file system, such as /run/kleidi", path, err)
		}
		holder := make([]byte, 32)
		n, _ := f.ReadAt(holder, 0)
		return nil, fmt.Errorf("another process (PID %s) holds %s; stop it first, or give this one another path",
			strings.TrimSpace(string(holder[:n])), path)
	}
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintln(f, os.Getpid()) // for display: the lock works without it
	}
	return f, nil
}

// checkOccupant accepts a free path or a socket on which nothing answers.
func checkOccupant(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket (%s); move it away, kleidi replaces nothing but its own stale socket", path, fi.Mode())
	}
	c, err := net.DialTimeout("unix", path, probeTimeout)
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return nil // stale: bind's rename replaces it
	}
	if err != nil {
		return fmt.Errorf("%s exists, and whether something answers on it can't be told: %w; stop what listens there, or remove it", path, err)
	}
	defer c.Close()
	who := "something"
	if p, err := peerOf(c.(*net.UnixConn)); err == nil {
		who = fmt.Sprintf("process %d (UID %d)", p.PID, p.UID)
	}
	return fmt.Errorf("%s answers already: %s listens there; stop it first, or give this one another path", path, who)
}

// bind makes the socket in a private folder and renames it into its place.
func bind(cfg Config) (*net.UnixListener, inode, error) {
	dir := beside(cfg.Path, ".new")
	tmp := filepath.Join(dir, "s")
	if err := privateFolder(dir, tmp); err != nil {
		return nil, inode{}, err
	}
	defer os.Remove(dir)
	ul, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, inode{}, err
	}
	ul.SetUnlinkOnClose(false) // Close removes the file, if the path is still ours
	ino, err := installSocket(cfg, tmp)
	if err != nil {
		os.Remove(tmp)
		ul.Close()
		return nil, inode{}, err
	}
	return ul, ino, nil
}

// privateFolder makes dir, even if a killed process left one behind.
func privateFolder(dir, tmp string) error {
	err := os.Mkdir(dir, 0o700)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s is not a folder that kleidi made; remove it", dir)
	}
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// installSocket gives the socket its mode and owner, in this order: changing the mode of
// somebody else's file would need CAP_FOWNER. Until the socket is moved to its path,
// nobody else can reach it.
func installSocket(cfg Config, tmp string) (inode, error) {
	if err := os.Chmod(tmp, cfg.Mode.Perm()); err != nil {
		return inode{}, err
	}
	if o := cfg.Owner; o != nil {
		if err := os.Chown(tmp, o.UID, o.GID); err != nil {
			return inode{}, fmt.Errorf("give the socket to UID %d, GID %d: %w; only root may do so", o.UID, o.GID, err)
		}
	}
	ino, err := inodeOf(tmp)
	if err != nil {
		return inode{}, err
	}
	return ino, os.Rename(tmp, cfg.Path)
}

// inode distinguishes files at the same path.
type inode struct{ dev, ino uint64 }

func inodeOf(path string) (inode, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return inode{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return inode{uint64(st.Dev), st.Ino}, nil
}

// Close removes the socket, if it is still the one that Listen made, and stops
// listening. Closing twice is harmless.
func (l *Listener) Close() error {
	l.once.Do(func() {
		if now, err := inodeOf(l.path); err == nil && now == l.ino {
			l.err = os.Remove(l.path)
		}
		l.err = errors.Join(l.err, l.UnixListener.Close(), l.lock.Close())
	})
	return l.err
}

// Addr returns the address that clients dial, not the bound address.
func (l *Listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Accept returns the next connection, a [*Conn]. Connections above the limits
// are closed at once.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		p, err := peerOf(c)
		if err != nil {
			c.Close()
			continue
		}
		if conn := l.seats.take(c, p); conn != nil {
			return conn, nil
		}
		c.Close()
	}
}
