package wire

import (
	"maps"
	"slices"
)

// Decoded lists the keys of the requests that DecodeRequest walks over.
func Decoded() []int16 {
	keys := slices.Concat(slices.Collect(maps.Keys(groupRequests)), slices.Collect(maps.Keys(otherRequests)))
	slices.Sort(keys)
	return keys
}
