package gather

import (
	"bytes"
	"context"
	"path/filepath"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/predict"
)

// mostNext is how many new images are predicted.
const mostNext = 4

// nextBoots predicts the boots of new unified kernel images, as kleidi reseal does.
func nextBoots(ctx context.Context, machine *node.Node, n *doctor.Node) map[string]doctor.Known[doctor.Next] {
	all := map[string]doctor.Known[doctor.Next]{}
	newer, _ := n.NewBootFiles()
	for _, file := range newer {
		if strings.Contains(file, "/EFI/Linux/") && len(all) < mostNext {
			all[file] = known(nextBoot(ctx, machine, filepath.Join(n.Root, file)))
		}
	}
	return all
}

func nextBoot(ctx context.Context, n *node.Node, uki string) (doctor.Next, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	b, err := files.Read(uki, predict.MaxFile)
	if err != nil {
		return doctor.Next{}, err
	}
	p, err := reseal.Predict(ctx, n, predict.Change{Next: predict.Files{UKI: b}})
	if err != nil {
		return doctor.Next{}, err
	}
	u, _, err := n.Stored(ctx)
	if err != nil {
		return doctor.Next{}, err
	}
	sealed := slices.ContainsFunc(n.View.BootStates(u.Slots(), tpm.UsePresent, tpm.UseNext), func(s tpm.BootState) bool {
		for i, value := range s.Values {
			if !bytes.Equal(p.State.Values[i], value) {
				return false
			}
		}
		return true
	})
	return doctor.Next{Moved: p.Moved, Prepared: sealed}, nil
}
