package usage

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/beezy-dev/kleidi/internal/regular"
	"github.com/beezy-dev/kleidi/seal"
)

// Etcd says how to reach an etcd.
type Etcd struct {
	// Endpoints are the URLs of its members. Any of them may answer.
	Endpoints []string
	// CAFile, CertFile and KeyFile are PEM files. All are empty for an etcd without TLS.
	CAFile, CertFile, KeyFile string
}

// Limits of one answer of etcd.
const (
	pageObjects = 500
	pageBytes   = 32 << 20
	pageTimeout = 30 * time.Second
)

// attempts bounds how often a page is asked for, at one endpoint after the other.
const attempts = 3

// Read counts everything that is stored, in pages at one revision.
func (e *Etcd) Read(ctx context.Context, prefix string, progress Progress) (*Report, error) {
	s := &scan{etcd: e, tally: newTally(prefix), progress: progress, limit: pageObjects}
	defer s.close()
	if err := s.dial(); err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	// Three ranges hold every key. The middle one is the one that kube-apiserver itself
	// asks for, and comes first: its count is the total for the progress.
	folder := prefix + "/"
	after := prefix + "0" // the byte after the slash
	for i, r := range [][2]string{{folder, after}, {"\x00", folder}, {after, "\x00"}} {
		// Only kine, which stores kube-apiserver's keys in another database, names no
		// cluster. PostgreSQL refuses the other two ranges, whose bounds hold a zero byte.
		if i > 0 && s.cluster == 0 {
			break
		}
		if err := s.read(ctx, r[0], r[1]); err != nil {
			return nil, fmt.Errorf("etcd %s: %w", strings.Join(e.Endpoints, ","), err)
		}
	}
	report := s.report()
	report.Source, report.Revision = strings.Join(e.Endpoints, ","), s.revision
	if report.empty() {
		return nil, &seal.Error{Err: fmt.Errorf("etcd %s: %w %s", report.Source, errNothing, prefix), Hint: hintPrefix}
	}
	return &report, nil
}

// scan reads one etcd.
type scan struct {
	etcd *Etcd
	*tally
	progress Progress

	members  []*grpc.ClientConn
	at       int // the member that answered last
	limit    int64
	cluster  uint64
	revision int64
	done     int64
	total    int64
}

func (s *scan) dial() error {
	if len(s.etcd.Endpoints) == 0 {
		return errors.New("no endpoint is named")
	}
	secure, err := s.etcd.credentials()
	if err != nil {
		return err
	}
	for _, endpoint := range s.etcd.Endpoints {
		target, useTLS, err := target(endpoint)
		if err != nil {
			return err
		}
		c := secure
		if !useTLS {
			c = insecure.NewCredentials()
		}
		conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(c), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(pageBytes), grpc.ForceCodec(rawCodec{})))
		if err != nil {
			return err
		}
		s.members = append(s.members, conn)
	}
	return nil
}

func (s *scan) close() {
	for _, c := range s.members {
		_ = c.Close()
	}
}

// target returns gRPC's name of an endpoint.
func target(endpoint string) (name string, useTLS bool, err error) {
	scheme, address, ok := strings.Cut(endpoint, "://")
	address = strings.TrimSuffix(address, "/")
	switch {
	case !ok || address == "":
	case scheme == "https":
		return "dns:///" + address, true, nil
	case scheme == "http":
		return "dns:///" + address, false, nil
	case scheme == "unixs":
		return "unix:" + address, true, nil
	case scheme == "unix":
		return "unix:" + address, false, nil
	}
	return "", false, fmt.Errorf("endpoint %q; want one such as https://127.0.0.1:2379", endpoint)
}

// credentials returns the credentials of a client of etcd.
func (e *Etcd) credentials() (credentials.TransportCredentials, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if err := regular.Check(e.CAFile, e.CertFile, e.KeyFile); err != nil {
		return nil, err
	}
	if e.CAFile != "" {
		b, err := os.ReadFile(e.CAFile)
		if err != nil {
			return nil, err
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("%s holds no certificate in PEM", e.CAFile)
		}
	}
	if e.CertFile != "" || e.KeyFile != "" {
		pair, err := tls.LoadX509KeyPair(e.CertFile, e.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(c), nil
}

// rawCodec leaves messages as bytes, so that the values of a page are not copied. The
// messages are those of etcdserverpb.KV.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (rawCodec) Name() string                       { return "proto" }

// read counts the keys in [from, end).
func (s *scan) read(ctx context.Context, from, end string) error {
	for {
		p, err := s.page(ctx, from, end)
		if err != nil {
			return err
		}
		for _, kv := range p.pairs {
			key, value, err := keyValue(kv)
			if err != nil || len(key) == 0 || string(key) < from {
				return errors.New("its answer is malformed")
			}
			k, err := s.kindOf(key, value)
			if err != nil {
				return err
			}
			s.count(k, 1)
			from = string(key) + "\x00"
		}
		if s.done == 0 {
			s.total = p.count
		}
		s.done += int64(len(p.pairs))
		s.progress.tell(s.done, max(s.done, s.total))
		if !p.more {
			return nil
		}
		if len(p.pairs) == 0 {
			return errors.New("its answer is malformed: it announces more, and holds nothing")
		}
	}
}

// page asks for a page, and tries the other members if one does not answer.
func (s *scan) page(ctx context.Context, from, end string) (*page, error) {
	var failed error
	for try := 0; try < attempts*len(s.members); try++ {
		p, err := s.ask(ctx, from, end)
		switch status.Code(err) {
		case codes.OK:
			s.limit = min(2*s.limit, pageObjects)
			return p, s.accept(p)
		case codes.ResourceExhausted: // larger than pageBytes
			if s.limit == 1 {
				return nil, describe(err)
			}
			s.limit = max(s.limit/8, 1)
			try--
		case codes.Unavailable, codes.DeadlineExceeded:
			failed = err
			s.at = (s.at + 1) % len(s.members)
		default:
			return nil, describe(err)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	return nil, describe(failed)
}

// accept checks that a page comes from the same etcd as the first one.
func (s *scan) accept(p *page) error {
	switch {
	case s.revision == 0 && p.revision > 0:
		s.revision, s.cluster = p.revision, p.cluster
		return nil
	case p.cluster != s.cluster:
		return &seal.Error{Err: errors.New("its endpoints are members of different clusters"), Hint: "name the members of one etcd in one --etcd, and another etcd in an --etcd of its own"}
	case s.revision == 0 || p.revision < s.revision:
		return &seal.Error{Err: fmt.Errorf("it went back from revision %d to %d", s.revision, p.revision), Hint: "it may have been restored just now; run the command again"}
	}
	return nil
}

// describe turns a failed call into an error with its next step.
func describe(err error) error {
	text, hint := status.Convert(err).Message(), ""
	switch code := status.Code(err); {
	case code == codes.OutOfRange:
		text, hint = "it has compacted the revision that was being read", "run the command again, or read a snapshot: kleidi usage --snapshot FILE"
	case code == codes.ResourceExhausted:
		text, hint = "an object is larger than 32 MiB", "find it with etcdctl"
	case code == codes.DeadlineExceeded:
		text, hint = "no member answered in time", "see with etcdctl endpoint health whether it has a quorum"
	case code == codes.PermissionDenied || code == codes.Unauthenticated:
		hint = "the client certificate may not read everything; name kube-apiserver's own with --cert and --key"
	case code == codes.Unavailable && strings.Contains(text, "tls:"):
		hint = "name etcd's CA with --cacert, and a client certificate with --cert and --key"
	case code == codes.Unavailable:
		// A member that wants a client certificate may also just close the connection.
		hint = "see whether etcd runs, name its members with --etcd, and a client certificate with --cert and --key if etcd asks for one"
	}
	return &seal.Error{Err: errors.New(seal.OneLine(text, 400)), Hint: hint}
}

// page is an answer of etcd.
type page struct {
	cluster  uint64
	revision int64
	pairs    [][]byte // mvccpb.KeyValue
	more     bool
	count    int64
}

// Fields of etcdserverpb.RangeRequest.
const (
	requestKey      protowire.Number = 1
	requestEnd      protowire.Number = 2
	requestLimit    protowire.Number = 3
	requestRevision protowire.Number = 4
)

// Fields of etcdserverpb.RangeResponse, and of the ResponseHeader in it.
const (
	responseHeader protowire.Number = 1
	responsePairs  protowire.Number = 2
	responseMore   protowire.Number = 3
	responseCount  protowire.Number = 4

	headerCluster  protowire.Number = 1
	headerRevision protowire.Number = 3
)

// ask asks one member for one page.
func (s *scan) ask(ctx context.Context, from, end string) (*page, error) {
	var request, answer []byte
	request = protowire.AppendString(protowire.AppendTag(request, requestKey, protowire.BytesType), from)
	request = protowire.AppendString(protowire.AppendTag(request, requestEnd, protowire.BytesType), end)
	request = protowire.AppendVarint(protowire.AppendTag(request, requestLimit, protowire.VarintType), uint64(s.limit))
	request = protowire.AppendVarint(protowire.AppendTag(request, requestRevision, protowire.VarintType), uint64(s.revision))
	ctx, cancel := context.WithTimeout(ctx, pageTimeout)
	defer cancel()
	if err := s.members[s.at].Invoke(ctx, "/etcdserverpb.KV/Range", &request, &answer); err != nil {
		return nil, err
	}
	p, err := parsePage(answer)
	if err != nil {
		return nil, status.Error(codes.Internal, "its answer is malformed")
	}
	return p, nil
}

// parsePage parses a RangeResponse.
func parsePage(b []byte) (*page, error) {
	p := &page{}
	err := eachField(b, func(field protowire.Number, value []byte, number uint64) error {
		switch field {
		case responseHeader:
			return eachField(value, func(field protowire.Number, _ []byte, number uint64) error {
				switch field {
				case headerCluster:
					p.cluster = number
				case headerRevision:
					p.revision = int64(min(number, math.MaxInt64))
				}
				return nil
			})
		case responsePairs:
			p.pairs = append(p.pairs, value)
		case responseMore:
			p.more = number != 0
		case responseCount:
			p.count = int64(min(number, math.MaxInt64))
		}
		return nil
	})
	return p, err
}
