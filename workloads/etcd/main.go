// etcd as its authors publish it: etcdmain is all that its own main calls. Built from here because its
// module has replace directives, which `go install` of a module refuses.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
