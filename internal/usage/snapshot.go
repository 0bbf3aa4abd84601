package usage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/beezy-dev/kleidi/internal/etcdfile"
	"github.com/beezy-dev/kleidi/internal/regular"
	"github.com/beezy-dev/kleidi/seal"
)

// Progress reports how much of the total was read. The total is 0 while it is unknown.
type Progress func(read, total int64)

func (p Progress) tell(read, total int64) {
	if p != nil {
		p(read, total)
	}
}

const (
	hintSnapshot = "take a new one with etcdctl snapshot save FILE"
	hintAnother  = "name the file that etcdctl snapshot save has written"
	hintWriting  = "wait until etcdctl snapshot save has ended; of a running etcd, name a snapshot and not its own file"
)

// Snapshot reads the file of an etcd snapshot, as etcdctl snapshot save writes it, or a
// copy of a stopped etcd's member/snap/db. It needs no credentials, and it changes nothing.
//
// The file is accepted only if, in this order: nobody has it open for writing; it is a
// database of etcd 3; it is as long as the database says; its checksum, if it ends in one, is
// right; every page in use is read once and fits; the revisions ascend; and the file did
// not change meanwhile.
func Snapshot(ctx context.Context, file, prefix string, progress Progress) (*Report, error) {
	f, err := regular.Open(file)
	if err != nil {
		return nil, seal.WithHint(fmt.Errorf("snapshot: %w", err), hintAnother)
	}
	defer f.Close()
	before, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("snapshot: %w", err)
	case strings.HasSuffix(file, ".part") || beingWritten(f):
		return nil, &seal.Error{Err: fmt.Errorf("snapshot: %s is still being written", file), Hint: hintWriting}
	}
	r, err := readSnapshot(ctx, f, before.Size(), prefix, progress)
	if after, e := f.Stat(); e != nil || after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) {
		return nil, &seal.Error{Err: fmt.Errorf("snapshot: %s changed while it was read", file), Hint: hintWriting}
	}
	if err != nil {
		return nil, describeSnapshot(file, err)
	}
	r.Source = file
	return r, nil
}

// beingWritten reports whether a process has f open for writing. The kernel grants a
// lease only on a file that nobody writes. On file systems without leases beingWritten
// can't tell, but a change during the reading is still found.
func beingWritten(f *os.File) bool {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
		return errors.Is(err, unix.EAGAIN)
	}
	_, _ = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	return false
}

// The reasons why a file is not a reliable snapshot.
var (
	errTruncated = errors.New("it is truncated")
	errChecksum  = errors.New("its checksum is wrong")
	errDamaged   = errors.New("it is damaged")
	errVersion   = errors.New("its storage version is not one of etcd 3")
)

// describeSnapshot adds the next step to an error of readSnapshot.
func describeSnapshot(file string, err error) error {
	hint := hintSnapshot
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("snapshot %s: %w", file, err)
	case errors.Is(err, etcdfile.ErrNotDatabase), errors.Is(err, etcdfile.ErrNoBucket):
		hint = hintAnother
	case errors.Is(err, errVersion):
		hint = "install a version of kleidi that reads it"
	case errors.Is(err, errTruncated), errors.Is(err, errChecksum):
		hint = "copy it again from where it was made, or " + hintSnapshot
	case errors.Is(err, errNothing):
		hint = hintPrefix
	case errors.Is(err, errTooManyKinds):
		hint = "look at the keys with etcdctl get"
	}
	return &seal.Error{Err: fmt.Errorf("snapshot %s: %w", file, err), Hint: hint}
}

// readSnapshot reads a snapshot of size bytes.
func readSnapshot(ctx context.Context, r io.ReaderAt, size int64, prefix string, progress Progress) (*Report, error) {
	pages, sum := size, int64(0)
	// Pages have a multiple of 512 bytes; etcd appends a SHA-256 sum.
	switch size % 512 {
	case sha256.Size:
		pages, sum = size-sha256.Size, sha256.Size
	case 0:
	default:
		if _, err := etcdfile.Open(r, size); errors.Is(err, etcdfile.ErrNotDatabase) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: it ends within a page", errTruncated)
	}
	d, err := etcdfile.Open(r, pages)
	if errors.Is(err, etcdfile.ErrShort) {
		return nil, fmt.Errorf("%w: %w", errTruncated, err)
	} else if err != nil {
		return nil, err
	}
	if sum > 0 {
		if err := checkSum(ctx, r, pages, progress); err != nil {
			return nil, err
		}
	}
	version, err := storageVersion(d)
	if err != nil {
		return nil, err
	}
	l := newLive(prefix)
	var listErr error // of the callback, unlike one of the database
	err = d.Each("key", func(key, value []byte) error {
		listErr = l.add(key, value)
		if listErr == nil && l.revisions%4096 == 0 {
			progress.tell(int64(l.revisions), 0)
			listErr = ctx.Err()
		}
		return listErr
	})
	switch {
	case listErr != nil:
		return nil, listErr
	case errors.Is(err, etcdfile.ErrNoBucket):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	report := l.report()
	if report.empty() {
		return nil, fmt.Errorf("%w %s", errNothing, prefix)
	}
	report.keyring = l.keyring
	report.Snapshot = &SnapshotInfo{Etcd: version, Checked: sum > 0, Revisions: l.revisions}
	return &report, nil
}

// errNothing is followed by the prefix.
var errNothing = errors.New("no object of Kubernetes is stored below")

const hintPrefix = "name kube-apiserver's --etcd-prefix with --prefix"

func checkSum(ctx context.Context, r io.ReaderAt, pages int64, progress Progress) error {
	sum := sha256.New()
	b := make([]byte, 1<<20)
	for at := int64(0); at < pages; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := r.ReadAt(b[:min(int64(len(b)), pages-at)], at)
		if n == 0 {
			return fmt.Errorf("%w: %w", errTruncated, err)
		}
		sum.Write(b[:n])
		at += int64(n)
		progress.tell(at, pages)
	}
	var want [sha256.Size]byte
	if _, err := r.ReadAt(want[:], pages); err != nil {
		return fmt.Errorf("%w: %w", errTruncated, err)
	}
	if !bytes.Equal(sum.Sum(nil), want[:]) {
		return errChecksum
	}
	return nil
}

// storageVersion returns the version of etcd that wrote the database. etcd 3.6 names
// it, 3.5 stores a term, and 3.4 does neither.
func storageVersion(d *etcdfile.Database) (string, error) {
	version := "3.4"
	err := d.Each("meta", func(key, value []byte) error {
		switch string(key) {
		case "term":
			if version == "3.4" {
				version = "3.5"
			}
		case "storageVersion":
			version = seal.OneLine(string(value), 32)
		}
		return nil
	})
	switch major, rest, _ := strings.Cut(version, "."); {
	case errors.Is(err, etcdfile.ErrNoBucket):
		return "", err
	case err != nil:
		return "", fmt.Errorf("%w: %w", errDamaged, err)
	case major != "3":
		return "", fmt.Errorf("%w but %s", errVersion, version)
	default:
		minor, _, _ := strings.Cut(rest, ".")
		return major + "." + minor, nil
	}
}

// live keeps the kind of the last revision of each key. Keys are kept as digests, so that
// each live key takes 35 to 60 bytes whatever its length, and no two keys share a digest.
type live struct {
	*tally
	seeds     [2]maphash.Seed
	last      map[[2]uint64]int32
	revision  [2]uint64
	revisions int
	// keyring is the last value of the key of kleidi's shared keyring, whose key is at.
	keyring []byte
	at      string
}

func newLive(prefix string) *live {
	return &live{tally: newTally(prefix), seeds: [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}, last: map[[2]uint64]int32{}, at: prefix + keyringKey}
}

// Sizes of a key of etcd's bucket: a revision and a sub-revision with an underscore
// between, and a letter if the revision deletes.
const (
	revisionSize  = 17
	tombstoneSize = revisionSize + 1
)

// Fields of mvccpb.KeyValue.
const (
	fieldKey   protowire.Number = 1
	fieldValue protowire.Number = 5
)

// add notes one revision of one key. Revisions ascend.
func (l *live) add(bucketKey, message []byte) error {
	deletes := len(bucketKey) == tombstoneSize && bucketKey[revisionSize] == 't'
	if len(bucketKey) != revisionSize && !deletes || bucketKey[8] != '_' {
		return fmt.Errorf("%w: a revision is malformed", errDamaged)
	}
	revision := [2]uint64{binary.BigEndian.Uint64(bucketKey), binary.BigEndian.Uint64(bucketKey[9:])}
	if l.revisions > 0 && (revision[0] < l.revision[0] || revision[0] == l.revision[0] && revision[1] <= l.revision[1]) {
		return fmt.Errorf("%w: revision %d does not ascend", errDamaged, revision[0])
	}
	l.revision = revision
	l.revisions++
	if len(message) == 0 { // etcdutl snapshot restore --bump-revision writes an empty revision
		return nil
	}
	key, value, err := keyValue(message)
	if err != nil || len(key) == 0 {
		return fmt.Errorf("%w: revision %d holds no key", errDamaged, revision[0])
	}
	if string(key) == l.at {
		l.keyring = bytes.Clone(value) // nil if it is deleted
	}
	digest := [2]uint64{maphash.Bytes(l.seeds[0], key), maphash.Bytes(l.seeds[1], key)}
	if deletes {
		delete(l.last, digest)
		return nil
	}
	k, err := l.kindOf(key, value)
	if err != nil {
		return err
	}
	l.last[digest] = int32(k)
	return nil
}

func (l *live) report() Report {
	for _, k := range l.last {
		l.count(int(k), 1)
	}
	r := l.tally.report()
	r.Revision = int64(l.revision[0])
	return r
}

// keyValue parses an mvccpb.KeyValue.
func keyValue(message []byte) (key, value []byte, err error) {
	err = eachField(message, func(field protowire.Number, b []byte, _ uint64) error {
		switch field {
		case fieldKey:
			key = b
		case fieldValue:
			value = b
		}
		return nil
	})
	return key, value, err
}
