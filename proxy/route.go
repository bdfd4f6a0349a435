package proxy

import (
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
)

// action is what the proxy does with a request.
type action uint8

const (
	pass       action = iota // to the upstream and back, same bytes
	rewrite                  // to the upstream; the reply's addresses become ours (wire.RewriteResponse)
	coordinate               // to the coordinator, here or at a peer
	local                    // answered by the proxy itself; FindCoordinator only for groups, else like rewrite
	refuse                   // answered by the proxy with an error (refusal)
)

// route says what becomes of the requests of one api key, and why.
type route struct {
	action action
	// bound: the answer depends on the broker that is asked, so no other may give it. What is not bound may be
	// answered by any live broker; isBound looks into the requests of which only some are.
	bound bool
	// hidden: not shown in ApiVersions, although the upstream may have it.
	hidden bool
	reason string
}

const (
	ofPartition    = "a matter of the partitions' leader"
	ofTransaction  = "a matter of the transaction's coordinator"
	ofCluster      = "any broker answers it, or hands it to the controller"
	ofConnection   = "a matter of this very connection"
	ofGroup        = "group and offset requests end here"
	ofDirectories  = "a matter of that broker's directories"
	ofBrokers      = "only brokers and controllers send it"
	ofNextGroups   = "KIP-848 is not served yet"
	ofShareGroups  = "share groups (KIP-932) are not served; their replies name brokers' addresses"
	ofStreams      = "streams groups (KIP-1071) are not served"
	ofTransactions = "offsets in transactions are not served yet"
)

func anyBroker() route             { return route{action: pass, reason: ofCluster} }
func bound(reason string) route    { return route{action: pass, bound: true, reason: reason} }
func internal() route              { return route{action: pass, bound: true, hidden: true, reason: ofBrokers} }
func group() route                 { return route{action: coordinate, reason: ofGroup} }
func unserved(reason string) route { return route{action: refuse, hidden: true, reason: reason} }

// routes has every api key of Kafka up to 4.4. A test compares it with the message definitions of the kafka-clients
// jar: its keys, and the fields that look like a broker's address (see notAddresses there).
var routes = map[int16]route{
	0:  {action: rewrite, bound: true, reason: "replies from 10 on name new leaders' addresses (KIP-951)"},   // Produce
	1:  bound(ofPartition),                                                                                   // Fetch; replies name addresses from 16 on, so it is shown up to 15
	2:  bound(ofPartition),                                                                                   // ListOffsets
	3:  {action: rewrite, reason: "names all brokers"},                                                       // Metadata
	4:  internal(),                                                                                           // LeaderAndIsr
	5:  internal(),                                                                                           // StopReplica
	6:  internal(),                                                                                           // UpdateMetadata
	7:  internal(),                                                                                           // ControlledShutdown
	8:  group(),                                                                                              // OffsetCommit
	9:  group(),                                                                                              // OffsetFetch
	10: {action: local, reason: "groups are placed here; other kinds go upstream, and replies name brokers"}, // FindCoordinator
	11: group(),                                                                                              // JoinGroup
	12: group(),                                                                                              // Heartbeat
	13: group(),                                                                                              // LeaveGroup
	14: group(),                                                                                              // SyncGroup
	15: group(),                                                                                              // DescribeGroups
	16: group(),                                                                                              // ListGroups
	17: bound(ofConnection),                                                                                  // SaslHandshake
	18: {action: local, reason: "decides what clients send; must work while the broker is down"},             // ApiVersions
	19: anyBroker(),                                                                                          // CreateTopics
	20: anyBroker(),                                                                                          // DeleteTopics
	21: bound(ofPartition),                                                                                   // DeleteRecords
	22: bound(ofTransaction),                                                                                 // InitProducerId; without a transactional id any broker has one
	23: bound(ofPartition),                                                                                   // OffsetForLeaderEpoch
	24: bound(ofTransaction),                                                                                 // AddPartitionsToTxn
	25: {action: refuse, reason: ofTransactions},                                                             // AddOffsetsToTxn
	26: bound(ofTransaction),                                                                                 // EndTxn
	27: bound(ofPartition),                                                                                   // WriteTxnMarkers; the admin client aborts transactions with it
	28: {action: refuse, reason: ofTransactions},                                                             // TxnOffsetCommit
	29: anyBroker(),                                                                                          // DescribeAcls
	30: anyBroker(),                                                                                          // CreateAcls
	31: anyBroker(),                                                                                          // DeleteAcls
	32: bound("a broker's own configuration; others any broker has"),                                         // DescribeConfigs
	33: bound("a broker's own configuration; others any broker takes"),                                       // AlterConfigs
	34: bound(ofDirectories),                                                                                 // AlterReplicaLogDirs
	35: bound(ofDirectories),                                                                                 // DescribeLogDirs
	36: bound(ofConnection),                                                                                  // SaslAuthenticate
	37: anyBroker(),                                                                                          // CreatePartitions
	38: anyBroker(),                                                                                          // CreateDelegationToken
	39: anyBroker(),                                                                                          // RenewDelegationToken
	40: anyBroker(),                                                                                          // ExpireDelegationToken
	41: anyBroker(),                                                                                          // DescribeDelegationToken
	42: group(),                                                                                              // DeleteGroups
	43: anyBroker(),                                                                                          // ElectLeaders
	44: bound("a broker's own configuration; others any broker takes"),                                       // IncrementalAlterConfigs
	45: anyBroker(),                                                                                          // AlterPartitionReassignments
	46: anyBroker(),                                                                                          // ListPartitionReassignments
	47: group(),                                                                                              // OffsetDelete
	48: anyBroker(),                                                                                          // DescribeClientQuotas
	49: anyBroker(),                                                                                          // AlterClientQuotas
	50: anyBroker(),                                                                                          // DescribeUserScramCredentials
	51: anyBroker(),                                                                                          // AlterUserScramCredentials
	52: internal(),                                                                                           // Vote
	53: internal(),                                                                                           // BeginQuorumEpoch
	54: internal(),                                                                                           // EndQuorumEpoch
	55: anyBroker(),                                                                                          // DescribeQuorum
	56: internal(),                                                                                           // AlterPartition
	57: anyBroker(),                                                                                          // UpdateFeatures
	58: internal(),                                                                                           // Envelope
	59: internal(),                                                                                           // FetchSnapshot
	60: {action: rewrite, reason: "names all brokers"},                                                       // DescribeCluster
	61: bound(ofPartition),                                                                                   // DescribeProducers
	62: internal(),                                                                                           // BrokerRegistration
	63: internal(),                                                                                           // BrokerHeartbeat
	64: anyBroker(),                                                                                          // UnregisterBroker
	65: bound(ofTransaction),                                                                                 // DescribeTransactions
	66: bound(ofTransaction),                                                                                 // ListTransactions; each broker has those it coordinates
	67: internal(),                                                                                           // AllocateProducerIds
	68: unserved(ofNextGroups),                                                                               // ConsumerGroupHeartbeat
	69: unserved(ofNextGroups),                                                                               // ConsumerGroupDescribe
	70: internal(),                                                                                           // ControllerRegistration
	71: anyBroker(),                                                                                          // GetTelemetrySubscriptions
	72: anyBroker(),                                                                                          // PushTelemetry; a broker that does not know the subscription says so, and it is renewed
	73: internal(),                                                                                           // AssignReplicasToDirs
	74: anyBroker(),                                                                                          // ListConfigResources
	75: anyBroker(),                                                                                          // DescribeTopicPartitions
	76: unserved(ofShareGroups),                                                                              // ShareGroupHeartbeat
	77: unserved(ofShareGroups),                                                                              // ShareGroupDescribe
	78: unserved(ofShareGroups),                                                                              // ShareFetch
	79: unserved(ofShareGroups),                                                                              // ShareAcknowledge
	80: anyBroker(),                                                                                          // AddRaftVoter
	81: anyBroker(),                                                                                          // RemoveRaftVoter
	82: internal(),                                                                                           // UpdateRaftVoter
	83: internal(),                                                                                           // InitializeShareGroupState
	84: internal(),                                                                                           // ReadShareGroupState
	85: internal(),                                                                                           // WriteShareGroupState
	86: internal(),                                                                                           // DeleteShareGroupState
	87: internal(),                                                                                           // ReadShareGroupStateSummary
	88: unserved(ofStreams),                                                                                  // StreamsGroupHeartbeat
	89: unserved(ofStreams),                                                                                  // StreamsGroupDescribe
	90: unserved(ofShareGroups),                                                                              // DescribeShareGroupOffsets
	91: unserved(ofShareGroups),                                                                              // AlterShareGroupOffsets
	92: unserved(ofShareGroups),                                                                              // DeleteShareGroupOffsets
	93: unserved(ofStreams),                                                                                  // StreamsGroupTopologyDescriptionUpdate
	94: anyBroker(),                                                                                          // UnregisterController
}

// routeOf gives the route of an api key. What we do not know passes untouched, and only its own broker answers it.
func routeOf(key int16) route {
	if r, ok := routes[key]; ok {
		return r
	}
	return route{action: pass, bound: true, reason: "unknown api key"}
}

// isBound says whether nobody but the broker that a request was sent to may answer it. It is asked when that broker
// is down: a request that is not bound may then go to any other.
func isBound(h wire.RequestHeader, frame []byte) bool {
	if !routeOf(h.APIKey).bound {
		return false
	}
	switch h.APIKey {
	case 22, 32, 33, 44:
	default:
		return true
	}
	req, err := wire.DecodeRequest(h, frame)
	if err != nil {
		return true
	}
	switch req := req.(type) {
	case *kmsg.InitProducerIDRequest:
		return req.TransactionalID != nil
	case *kmsg.DescribeConfigsRequest:
		for _, r := range req.Resources {
			if ofOneBroker(r.ResourceType, r.ResourceName) {
				return true
			}
		}
	case *kmsg.AlterConfigsRequest:
		for _, r := range req.Resources {
			if ofOneBroker(r.ResourceType, r.ResourceName) {
				return true
			}
		}
	case *kmsg.IncrementalAlterConfigsRequest:
		for _, r := range req.Resources {
			if ofOneBroker(r.ResourceType, r.ResourceName) {
				return true
			}
		}
	}
	return false
}

// ofOneBroker: the name of a broker resource is its node id; "" stands for the defaults of all brokers.
func ofOneBroker(t kmsg.ConfigResourceType, name string) bool {
	return t == kmsg.ConfigResourceTypeBrokerLogger || t == kmsg.ConfigResourceTypeBroker && name != ""
}
