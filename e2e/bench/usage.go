package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/internal/usage/usagetest"
)

const (
	// usageObjects are the live objects of the snapshot. Each was written again once, so
	// that there are twice as many revisions.
	usageObjects = 100_000
	usageRounds  = 5
	// usageValue is the size of a value, that of a small Secret.
	usageValue = 600
)

// printUsage compares the count of a snapshot's objects with a walk of bbolt over the
// same file that does the minimum of any count: find each key's last revision. They run
// in turns.
func printUsage(ctx context.Context, dir string) error {
	file, bare, err := makeSnapshot(dir)
	if err != nil {
		return fmt.Errorf("a snapshot: %w", err)
	}
	var counts, unchecked, walks []time.Duration
	var objects int
	var before, after runtime.MemStats
	for range usageRounds {
		start := time.Now()
		if err := walk(file); err != nil {
			return err
		}
		walks = append(walks, time.Since(start))
		runtime.GC()
		runtime.ReadMemStats(&before)
		start = time.Now()
		r, err := usage.Snapshot(ctx, file, usage.DefaultPrefix, nil)
		if err != nil {
			return err
		}
		counts = append(counts, time.Since(start))
		runtime.ReadMemStats(&after)
		objects = r.Objects
		start = time.Now()
		if _, err := usage.Snapshot(ctx, bare, usage.DefaultPrefix, nil); err != nil {
			return err
		}
		unchecked = append(unchecked, time.Since(start))
	}
	if objects != usageObjects {
		return fmt.Errorf("usage counts %d objects, %d are stored", objects, usageObjects)
	}
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	count, walked := median(counts), median(walks)
	fmt.Printf("\nusage of a snapshot: %d objects, %d revisions, %d MiB, medians of %d in turns\n", objects, 2*objects, info.Size()>>20, usageRounds)
	fmt.Printf("%-29s %6.0f ms, %.0f objects/s, %d MiB allocated\n", "with the checksum", inMS(count), float64(objects)/count.Seconds(), (after.TotalAlloc-before.TotalAlloc)>>20)
	fmt.Printf("%-29s %6.0f ms\n", "without a checksum", inMS(median(unchecked)))
	fmt.Printf("%-29s %6.0f ms (ratios %.2f and %.2f)\n", "a plain walk with bbolt", inMS(walked), count.Seconds()/walked.Seconds(), median(unchecked).Seconds()/walked.Seconds())
	return nil
}

func median(all []time.Duration) time.Duration {
	return slices.Sorted(slices.Values(all))[len(all)/2]
}

// usageRound returns every object, under the key of a round.
func usageRound(round int) []usagetest.Change {
	value := usagetest.Encrypted("kleidi", fmt.Sprintf("k1-%052d", round))
	value = protowire.AppendTag(value, 15, protowire.BytesType) // a field that is skipped
	value = protowire.AppendBytes(value, bytes.Repeat([]byte{'x'}, usageValue))
	objects := make([]usagetest.Change, usageObjects)
	for i := range objects {
		objects[i] = usagetest.Change{Key: fmt.Sprintf("/registry/secrets/namespace-%d/secret-%d", i%100, i), Value: value}
	}
	return objects
}

// makeSnapshot returns a snapshot, and the same database without a checksum.
func makeSnapshot(dir string) (summed, bare string, err error) {
	changes := make([]usagetest.Change, 0, 2*usageObjects)
	for round := range 2 {
		changes = append(changes, usageRound(round)...)
	}
	b, err := usagetest.Database(usagetest.Etcd36, changes...)
	if err != nil {
		return "", "", err
	}
	summed, bare = filepath.Join(dir, "snapshot.db"), filepath.Join(dir, "bare.db")
	return summed, bare, errors.Join(os.WriteFile(bare, b, 0o600), os.WriteFile(summed, usagetest.Summed(b), 0o600))
}

// walk finds the last revision of each key.
func walk(file string) error {
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer db.Close()
	last := map[string]int{}
	err = db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("key")).ForEach(func(_, v []byte) error {
			_, _, n := protowire.ConsumeTag(v) // mvccpb.KeyValue.key
			key, m := protowire.ConsumeBytes(v[max(n, 0):])
			if n < 0 || m < 0 {
				return errors.New("a revision is malformed")
			}
			last[string(key)] = len(v)
			return nil
		})
	})
	if err == nil && len(last) != usageObjects {
		err = fmt.Errorf("bbolt finds %d keys", len(last))
	}
	return err
}
