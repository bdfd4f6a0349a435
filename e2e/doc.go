// Package e2e tries the sidecar as its users do: real Kafka, real clients, real processes, nothing of our own linked in.
//
// The tests stand behind the build tag e2e (make e2e); the package lab beside them starts and stops things; setup, a
// script, installs Kafka and the clients in the user's cache. E2E_LONG=1 runs the long forms (make soak; make faults for
// those about several sidecars). Partitions and starved sidecars need root: network namespaces, control groups.
// E2E_DIRECT=1 lets the clients of TestLife speak to Kafka itself: what fails then too is the test's or the client's
// fault. E2E_BINARY names a sidecar to test instead of building one, E2E_CACHE another folder for what is installed.
//
// Every client is driven through a small program in its own language with one line protocol:
//
//	produce BOOTSTRAP TOPIC FROM TO          sends the keys k<FROM> to k<TO-1>, prints "produced N"
//	consume BOOTSTRAP TOPIC GROUP FLAVOUR    joins the group (FLAVOUR: eager, cooperative, static:<instance>) and prints
//	    assigned P,P,…    what it owns now, after each rebalance
//	    got P OFFSET KEY  a record, before it is committed
//	    committed         all that was got so far is
//	    left              a line on stdin made it leave in order
package e2e
