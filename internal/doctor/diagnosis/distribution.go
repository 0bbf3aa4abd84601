package diagnosis

// Distribution says how an operator repairs kube-apiserver on one kind of node.
type Distribution struct {
	// Kubeconfig is the administrator's. A node that has this file is of this distribution.
	Kubeconfig string
	// Restart restarts kube-apiserver.
	Restart string
	// Upgrade installs a newer kube-apiserver, or begins to.
	Upgrade string
	// Configure makes kube-apiserver ask kleidi. It is "" if kleidi kubeadm patch does that.
	Configure string
}

// distributions are in the order in which a node's is looked for; the first is assumed if
// none is found.
var distributions = []Distribution{
	{"/etc/kubernetes/admin.conf", "crictl stop $(crictl ps --quiet --name kube-apiserver)   # kubelet starts it again", "kubeadm upgrade plan", ""},
	{"/etc/rancher/rke2/rke2.yaml", "systemctl restart rke2-server", "systemctl restart rke2-server   # after a newer RKE2 is installed",
		"systemctl restart rke2-server   # after deploy/rke2/kleidi.yaml is /etc/rancher/rke2/config.yaml.d/50-kleidi.yaml: the section RKE2 of docs/operations.md"},
	{"/etc/rancher/k3s/k3s.yaml", "systemctl restart k3s", "systemctl restart k3s   # after a newer k3s is installed",
		"systemctl restart k3s   # after deploy/k3s/kleidi.yaml is /etc/rancher/k3s/config.yaml.d/50-kleidi.yaml: the section k3s of docs/operations.md"},
}

// DistributionOf returns the distribution of a node with these files.
func DistributionOf(exists func(file string) bool) Distribution {
	for _, d := range distributions {
		if exists(d.Kubeconfig) {
			return d
		}
	}
	return distributions[0]
}
