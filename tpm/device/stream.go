package device

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"
)

const (
	headerSize = 10   // tag, size, code (TPM 2.0 Library, Part 1, 18.2)
	maxMessage = 4096 // the buffer size of the PC Client profile's TPMs, and of swtpm
)

// stream carries commands and responses. Its reads and writes end with the context of
// the open call, or with the context of the last bind.
type stream interface {
	io.ReadWriteCloser
	// bind ties the stream to the context of another operation. It fails if the
	// earlier context has ended.
	bind(context.Context) error
}

func open(ctx context.Context, a Address) (stream, error) {
	if a.network == "device" {
		return openFile(ctx, a.where)
	}
	c, err := dial(ctx, a)
	if err != nil {
		return nil, err
	}
	s := &socket{Conn: c, stop: func() bool { return true }}
	if err := s.bind(ctx); err != nil {
		_ = c.Close()
		return nil, err
	}
	return s, nil
}

// dial waits for a place in swtpm's queue, which is short.
func dial(ctx context.Context, a Address) (net.Conn, error) {
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, a.network, a.where)
		if !errors.Is(err, unix.EAGAIN) {
			return c, err
		}
		select {
		case <-time.After(pollSlice):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", err, cause(ctx))
		}
	}
}

type socket struct {
	net.Conn
	ctx  context.Context
	stop func() bool
}

func (s *socket) bind(ctx context.Context) error {
	if !s.stop() {
		return cause(s.ctx)
	}
	deadline, _ := ctx.Deadline()
	if err := s.SetDeadline(deadline); err != nil {
		return err
	}
	s.ctx, s.stop = ctx, context.AfterFunc(ctx, func() { _ = s.SetDeadline(time.Unix(1, 0)) })
	return nil
}

func (s *socket) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("no answer: %w", cause(s.ctx))
	}
	return n, err
}

func (s *socket) Write(b []byte) (int, error) {
	n, err := s.Conn.Write(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("not taken: %w", cause(s.ctx))
	}
	return n, err
}

func (s *socket) Close() error {
	s.stop()
	return s.Conn.Close()
}

// cause returns why ctx ended. If only the socket's deadline has passed so far, cause
// reports the deadline of ctx as passed.
func cause(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return context.DeadlineExceeded
}

// file is a TPM's character device, opened non-blocking, so that the kernel runs the
// command in the background and poll(2) tells when the command has ended. An earlier
// read returns nothing, which os.File would take for the end of the file.
type file struct {
	fd  int
	ctx context.Context
}

// pollSlice is how often a wait for the device checks whether its context has ended.
const pollSlice = 50 * time.Millisecond

func openFile(ctx context.Context, path string) (stream, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err == nil {
			return &file{fd: fd, ctx: ctx}, nil
		}
		if err != unix.EBUSY && err != unix.EINTR { // /dev/tpm0 has one client at a time
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		select {
		case <-time.After(pollSlice):
		case <-ctx.Done():
			return nil, fmt.Errorf("open %s: %w: %w", path, err, cause(ctx))
		}
	}
}

func (f *file) bind(ctx context.Context) error {
	f.ctx = ctx
	return nil
}

func (f *file) Write(b []byte) (int, error) { return unix.Write(f.fd, b) }

func (f *file) Read(b []byte) (int, error) {
	for {
		p := []unix.PollFd{{Fd: int32(f.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(pollSlice/time.Millisecond))
		if err != nil && err != unix.EINTR {
			return 0, fmt.Errorf("poll: %w", err)
		}
		if n > 0 {
			n, err := unix.Read(f.fd, b)
			if n == 0 && err == nil {
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
		if f.ctx.Err() != nil {
			return 0, fmt.Errorf("no answer: %w", cause(f.ctx))
		}
	}
}

func (f *file) Close() error { return unix.Close(f.fd) }

// roundTrip sends one command and reads exactly one response, of the length in the
// response's header.
func roundTrip(ctx context.Context, s stream, command []byte) ([]byte, tpm2.TPMRC, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, cause(ctx)
	}
	if len(command) > maxMessage {
		return nil, 0, fmt.Errorf("command of %d bytes, a TPM takes %d", len(command), maxMessage)
	}
	if _, err := s.Write(command); err != nil {
		return nil, 0, fmt.Errorf("send a command: %w", err)
	}
	// A character device returns the whole response to one read, and drops the rest.
	buf := make([]byte, maxMessage)
	n, err := io.ReadAtLeast(s, buf, headerSize)
	if err != nil {
		return nil, 0, fmt.Errorf("read a response: %w", err)
	}
	size := int(binary.BigEndian.Uint32(buf[2:]))
	if size < headerSize || size > maxMessage || n > size {
		return nil, 0, fmt.Errorf("answer out of form: its header says %d bytes, %d came", size, n)
	}
	if _, err := io.ReadFull(s, buf[n:size]); err != nil {
		return nil, 0, fmt.Errorf("read a response: %w", err)
	}
	return buf[:size], tpm2.TPMRC(binary.BigEndian.Uint32(buf[6:])), nil
}
