package proxy

import (
	core "github.com/offset-sidecar/offset-sidecar/coordinator/group"
)

// place gives the node that we name as the coordinator of a group: by rendezvous hashing of the group's partition of
// __consumer_offsets over the brokers, so that one that comes or goes moves only the groups of its own partitions. Any
// node would do, as every listener serves every group; but all answers must agree, since franz-go looks the id up in
// Metadata and librdkafka overwrites its broker table with the address. Not ok if there is no broker.
func place(groupID string, nodes []int32) (node int32, ok bool) {
	partition := core.PartitionOf(groupID)
	var best uint64
	for _, n := range nodes {
		if w := weight(partition, n); !ok || w > best || w == best && n < node {
			best, node, ok = w, n, true
		}
	}
	return node, ok
}

// weight mixes partition and node id (the finalizer of splitmix64, twice). It must never change: sidecars of different
// versions have to agree.
func weight(partition, node int32) uint64 {
	return mix(mix(uint64(uint32(partition))) ^ uint64(uint32(node)))
}

func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
