// Package kubeadm lets the real kubeadm read the patch that kleidi writes for it. kubeadm
// writes the manifest of kube-apiserver in a root folder of its own; no cluster starts.
// It needs root, for the chroot.
package kubeadm
