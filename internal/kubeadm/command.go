package kubeadm

import (
	"path/filepath"

	"github.com/beezy-dev/kleidi/seal"
)

// DefaultEncryptionConfig is the path of the EncryptionConfiguration in README.
const DefaultEncryptionConfig = "/etc/kubernetes/kleidi-encryption.yaml"

// ApplyCommand is the command that gives an EncryptionConfiguration to the kube-apiserver of
// kubeadm, with kleidi's configuration if one was named. Its flag takes an absolute path
// alone.
func ApplyCommand(file, config string) string {
	if abs, err := filepath.Abs(file); err == nil {
		file = abs
	}
	command := "kleidi kubeadm patch --apply"
	if file != DefaultEncryptionConfig {
		command += " --encryption-config " + seal.Quote(file)
	}
	return configured(command, config)
}

// EncryptionConfigCommand is the command that writes the EncryptionConfiguration.
func EncryptionConfigCommand(config string) string {
	return configured("kleidi encryption-config --file "+DefaultEncryptionConfig, config)
}

func configured(command, config string) string {
	if config == "" {
		return command
	}
	return command + " --config " + seal.Quote(config)
}
