package usage

import (
	"bytes"
	"strings"
)

// DefaultPrefix is the default of kube-apiserver's --etcd-prefix.
const DefaultPrefix = "/registry"

// stored are the folders of built-in resources whose name differs from the resource's.
var stored = map[string]string{
	"minions":            "nodes",
	"controllers":        "replicationcontrollers",
	"services/specs":     "services",
	"services/endpoints": "endpoints",
	"ingress":            "ingresses",
}

// groups are the API groups of the built-in resources outside the core group. Their
// folders do not name the group.
var groups = byResource(map[string]string{
	"admissionregistration.k8s.io": "mutatingadmissionpolicies mutatingadmissionpolicybindings mutatingwebhookconfigurations validatingadmissionpolicies validatingadmissionpolicybindings validatingwebhookconfigurations",
	"apps":                         "controllerrevisions daemonsets deployments replicasets statefulsets",
	"autoscaling":                  "horizontalpodautoscalers",
	"batch":                        "cronjobs jobs",
	"certificates.k8s.io":          "certificatesigningrequests clustertrustbundles podcertificaterequests",
	"coordination.k8s.io":          "leasecandidates leases",
	"discovery.k8s.io":             "endpointslices",
	"flowcontrol.apiserver.k8s.io": "flowschemas prioritylevelconfigurations",
	"internal.apiserver.k8s.io":    "storageversions",
	"networking.k8s.io":            "ingressclasses ingresses ipaddresses networkpolicies servicecidrs",
	"node.k8s.io":                  "runtimeclasses",
	"policy":                       "poddisruptionbudgets",
	"rbac.authorization.k8s.io":    "clusterrolebindings clusterroles rolebindings roles",
	"resource.k8s.io":              "deviceclasses devicetaintrules resourceclaims resourceclaimtemplates resourceslices",
	"scheduling.k8s.io":            "priorityclasses",
	"storage.k8s.io":               "csidrivers csinodes csistoragecapacities storageclasses volumeattachments volumeattributesclasses",
	"storagemigration.k8s.io":      "storageversionmigrations",
})

func byResource(groups map[string]string) map[string]string {
	all := map[string]string{}
	for group, resources := range groups {
		for _, r := range strings.Fields(resources) {
			all[r] = group
		}
	}
	return all
}

// resourceOf returns the folder of a key below the prefix: "secrets", or
// "group/resource" for a custom resource. ok says that the key lies below the prefix.
func resourceOf(key []byte, prefix string) (folder []byte, ok bool) {
	rest, ok := bytes.CutPrefix(key, []byte(prefix))
	if !ok || len(rest) == 0 || rest[0] != '/' {
		return nil, false
	}
	rest = rest[1:]
	first := bytes.IndexByte(rest, '/')
	if first < 0 {
		return rest, true
	}
	// Custom resources, CustomResourceDefinitions and APIServices are stored below their
	// group, which holds a dot. Services and Endpoints share a folder.
	if bytes.IndexByte(rest[:first], '.') >= 0 || string(rest[:first]) == "services" {
		if second := bytes.IndexByte(rest[first+1:], '/'); second >= 0 {
			return rest[:first+1+second], true
		}
	}
	return rest[:first], true
}

// resourceName returns the name of a folder's resource in the form of the
// EncryptionConfiguration: "secrets", or "resource.group".
func resourceName(folder string) string {
	if group, resource, ok := strings.Cut(folder, "/"); ok && stored[folder] == "" {
		return resource + "." + group
	}
	name := folder
	if other, ok := stored[folder]; ok {
		name = other
	}
	if group, ok := groups[name]; ok {
		return name + "." + group
	}
	return name
}
