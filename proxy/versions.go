package proxy

import (
	"regexp"
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
)

// versions is a range of versions of an api key, both ends included.
type versions struct{ min, max int16 }

func (v versions) has(version int16) bool { return version >= v.min && version <= v.max }

const (
	keyProduce         = 0
	keyFetch           = 1
	keyOffsetCommit    = 8
	keyOffsetFetch     = 9
	keyFindCoordinator = 10
	keyListGroups      = 16
	keyApiVersions     = 18
)

// own has what we answer ourselves, whatever the upstream speaks: Kafka 4.3's versions.
var own = map[int16]versions{
	keyOffsetCommit:    {2, 10},
	keyOffsetFetch:     {1, 10},
	keyFindCoordinator: {0, 6},
	11:                 {0, 9}, // JoinGroup
	12:                 {0, 4}, // Heartbeat
	13:                 {0, 5}, // LeaveGroup
	14:                 {0, 5}, // SyncGroup
	15:                 {0, 6}, // DescribeGroups
	keyListGroups:      {0, 5},
	keyApiVersions:     {0, 5}, // 5: KIP-1242
	42:                 {0, 2}, // DeleteGroups
	47:                 {0, 0}, // OffsetDelete
}

// maxWithoutTopicIDs is the newest version of OffsetCommit and OffsetFetch that names topics: from 10 on both need
// topic ids, which only brokers with Metadata 10 have (KIP-848, KIP-516).
const maxWithoutTopicIDs = 9

// maxFetch is the newest Fetch whose replies name no addresses (KIP-951); they are never parsed.
const maxFetch = 15

// minSaslHandshake is the oldest SaslHandshake after which the client's tokens come in frames: those of version 0 do not,
// so that nobody could tell where requests begin again.
const minSaslHandshake = 1

// assumed stands in for an upstream that has never been reached: the versions that Kafka 2.8 and 4.3 have in common,
// so that a client that asked early can keep its connection whatever turns up behind it.
var assumed = map[int16]versions{
	keyProduce: {3, 9}, keyFetch: {4, 12}, 2: {1, 6}, 3: {0, 11}, 17: {1, 1}, 19: {2, 7}, 20: {1, 6}, 21: {0, 2},
	22: {0, 4}, 23: {2, 4}, 24: {0, 3}, 25: {0, 3}, 26: {0, 3}, 28: {0, 3}, 29: {1, 2}, 30: {1, 2}, 31: {1, 2},
	32: {1, 4}, 33: {0, 2}, 34: {1, 2}, 35: {1, 2}, 36: {0, 2}, 37: {0, 3}, 38: {1, 2}, 39: {1, 2}, 40: {1, 2},
	41: {1, 2}, 43: {0, 2}, 44: {0, 1}, 45: {0, 0}, 46: {0, 0}, 48: {0, 1}, 49: {0, 1}, 50: {0, 0}, 51: {0, 0},
	57: {0, 0}, 60: {0, 0}, 61: {0, 0},
}

// known is what the proxy knows when a client asks one of its listeners for ApiVersions.
type known struct {
	// upstream is that broker's newest answer, asked for in version 4 at least (features with minimum 0 are left out
	// below); nil when it was never reached.
	upstream  *kmsg.ApiVersionsResponse
	topicIDs  bool   // every broker has Metadata >= 10
	clusterID string // "" when not known
	nodeID    int32  // of the listener; -1 for the bootstrap listener
}

// served says whether a request may go on. For what we answer or rewrite, Kafka's own way with a version that it does
// not have holds: it closes the connection (unless it is ApiVersions, which has KIP-511). So does Fetch above the
// advertised version, as its reply could name a real address. Other keys are for the upstream to judge.
func served(key, version int16) bool {
	if v, ok := own[key]; ok {
		return key == keyApiVersions || v.has(version)
	}
	if newest, ok := wire.MaxRewritten(key); ok {
		return version <= newest
	}
	return key != keyFetch || version <= maxFetch
}

// softwareName is what a client's name and its version must look like (KIP-511, ApiVersionsRequest.isValid).
var softwareName = regexp.MustCompile(`^[a-zA-Z0-9](?:[a-zA-Z0-9\-.]*[a-zA-Z0-9])?$`)

// apiVersions answers an ApiVersions request of any version. An error means that it cannot be read, which Kafka
// answers by closing the connection.
func apiVersions(h wire.RequestHeader, frame []byte, k known) (*kmsg.ApiVersionsResponse, error) {
	if !own[keyApiVersions].has(h.APIVersion) {
		// KIP-511: version 0 is the one that any client can read, and the range lets it ask again.
		resp := kmsg.NewPtrApiVersionsResponse()
		resp.ErrorCode = kerr.UnsupportedVersion.Code
		resp.ApiKeys = []kmsg.ApiVersionsResponseApiKey{shown(keyApiVersions, own[keyApiVersions])}
		return resp, nil
	}
	decoded, err := wire.DecodeRequest(h, frame)
	if err != nil {
		return nil, err
	}
	req := decoded.(*kmsg.ApiVersionsRequest)
	resp := req.ResponseKind().(*kmsg.ApiVersionsResponse)
	if resp.ErrorCode = judge(req, k); resp.ErrorCode != 0 {
		return resp, nil
	}
	resp.ApiKeys = apiKeys(k)
	if k.upstream != nil && req.Version >= 3 {
		showFeatures(resp, k.upstream)
	}
	return resp, nil
}

// judge checks what the client says of itself, and of the broker it believes it talks to (KIP-1242).
func judge(req *kmsg.ApiVersionsRequest, k known) int16 {
	if req.Version >= 3 && !(softwareName.MatchString(req.ClientSoftwareName) && softwareName.MatchString(req.ClientSoftwareVersion)) {
		return kerr.InvalidRequest.Code
	}
	if req.Version < 5 {
		return 0
	}
	if (req.ClusterID == nil) != (req.NodeID == -1) {
		return kerr.InvalidRequest.Code
	}
	if req.ClusterID == nil {
		return 0
	}
	// What we do not know ourselves we cannot hold against the client.
	otherCluster := k.clusterID != "" && *req.ClusterID != k.clusterID
	otherNode := k.nodeID >= 0 && req.NodeID != k.nodeID
	if otherCluster || otherNode {
		return kerr.RebootstrapRequired.Code
	}
	return 0
}

func shown(key int16, v versions) kmsg.ApiVersionsResponseApiKey {
	a := kmsg.NewApiVersionsResponseApiKey()
	a.ApiKey, a.MinVersion, a.MaxVersion = key, v.min, v.max
	return a
}

// apiKeys merges the upstream's table with ours, in ascending order.
func apiKeys(k known) []kmsg.ApiVersionsResponseApiKey {
	upstream := assumed
	if k.upstream != nil {
		upstream = make(map[int16]versions, len(k.upstream.ApiKeys))
		for _, a := range k.upstream.ApiKeys {
			upstream[a.ApiKey] = versions{a.MinVersion, a.MaxVersion}
		}
	}
	var keys []kmsg.ApiVersionsResponseApiKey
	for key, v := range upstream {
		if _, ours := own[key]; ours || routeOf(key).hidden {
			continue
		}
		if newest, ok := wire.MaxRewritten(key); ok {
			v.max = min(v.max, newest)
		}
		switch key {
		case keyFetch:
			v.max = min(v.max, maxFetch)
		case keySaslHandshake:
			v.min = max(v.min, minSaslHandshake)
		case keyProduce:
			v.min = 0 // else old librdkafka turns compression off (KAFKA-18659)
		}
		if v.min <= v.max {
			keys = append(keys, shown(key, v))
		}
	}
	for key, v := range own {
		switch key {
		case keyOffsetCommit, keyOffsetFetch:
			if !k.topicIDs {
				v.max = min(v.max, maxWithoutTopicIDs)
			}
		case keyFindCoordinator:
			// Lookups of transactions are forwarded as they are, so the upstream has to know the version.
			if u, ok := upstream[key]; ok {
				v = versions{max(v.min, u.min), min(v.max, u.max)}
			}
		}
		keys = append(keys, shown(key, v))
	}
	slices.SortFunc(keys, func(a, b kmsg.ApiVersionsResponseApiKey) int { return int(a.ApiKey) - int(b.ApiKey) })
	return keys
}

// maxFeature has the features that clients act on and of which we serve less than the upstream may; 0 hides one.
// transaction.version 2 would make clients leave AddOffsetsToTxn to the broker, which does not see their offsets.
var maxFeature = map[string]int16{
	"group.version":       0,
	"share.version":       0,
	"streams.version":     0,
	"transaction.version": 1,
}

// showFeatures copies the upstream's features into a response of version 3 or newer, as far as we serve them.
func showFeatures(resp, upstream *kmsg.ApiVersionsResponse) {
	for _, f := range upstream.SupportedFeatures {
		newest, limited := maxFeature[f.Name]
		if limited && (newest == 0 || f.MinVersion > newest) {
			continue
		}
		if f.MinVersion == 0 && resp.Version < 4 {
			continue // older Java clients fail on a minimum of 0 (KAFKA-17011)
		}
		if limited {
			f.MaxVersion = min(f.MaxVersion, newest)
		}
		resp.SupportedFeatures = append(resp.SupportedFeatures, f)
	}
	for _, f := range upstream.FinalizedFeatures {
		newest, limited := maxFeature[f.Name]
		if limited && newest == 0 {
			continue
		}
		if limited {
			f.MaxVersionLevel = min(f.MaxVersionLevel, newest)
			f.MinVersionLevel = min(f.MinVersionLevel, newest)
		}
		resp.FinalizedFeatures = append(resp.FinalizedFeatures, f)
	}
	resp.FinalizedFeaturesEpoch = upstream.FinalizedFeaturesEpoch
	resp.ZkMigrationReady = upstream.ZkMigrationReady
}
