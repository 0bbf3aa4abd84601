package usage

import "bytes"

// DefaultPrefix is kube-apiserver's --etcd-prefix unless that is set.
const DefaultPrefix = "/registry"

// stored are the folders of built-in resources whose name differs from the resource's.
var stored = map[string]string{
	"minions":            "nodes",
	"controllers":        "replicationcontrollers",
	"services/specs":     "services",
	"services/endpoints": "endpoints",
	"ingress":            "ingresses",
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

// resourceName returns the name of a folder's resource as the EncryptionConfiguration
// has it: "secrets", or "resource.group".
func resourceName(folder string) string {
	if name, ok := stored[folder]; ok {
		return name
	}
	if group, resource, ok := bytes.Cut([]byte(folder), []byte("/")); ok {
		return string(resource) + "." + string(group)
	}
	return folder
}
