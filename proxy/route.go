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
	ofNewLeaders    = "replies from version 10 on name new leaders' addresses (KIP-951)"
	ofAllBrokers    = "names all brokers"
	ofPlacement     = "groups are placed here; other kinds go upstream, and replies name brokers"
	ofVersions      = "decides what clients send, and must work while the broker is down"
	ofConfiguration = "a broker's own configuration; others any broker has"
	ofPartition     = "a matter of the partitions' leader"
	ofTransaction   = "a matter of the transaction's coordinator"
	ofCluster       = "any broker answers it, or hands it to the controller"
	ofConnection    = "a matter of this very connection"
	ofGroup         = "group and offset requests end here"
	ofDirectories   = "a matter of that broker's directories"
	ofBrokers       = "only brokers and controllers send it"
	ofNextGroups    = "KIP-848 is not served yet"
	ofShareGroups   = "share groups (KIP-932) are not served; their replies name brokers' addresses"
	ofStreams       = "streams groups (KIP-1071) are not served"
	ofTransactions  = "offsets in transactions are not served yet"
)

func toAnyBroker() route               { return route{action: pass, reason: ofCluster} }
func toThisBroker(reason string) route { return route{action: pass, bound: true, reason: reason} }
func brokersOnly() route               { return route{action: pass, bound: true, hidden: true, reason: ofBrokers} }
func toCoordinator() route             { return route{action: coordinate, reason: ofGroup} }
func notServed(reason string) route    { return route{action: refuse, hidden: true, reason: reason} }

// routes has every api key of Kafka up to 4.4. A test compares it with the message definitions of the kafka-clients
// jar: it fails on a key that is missing here, and on a field that looks like a broker's address and is neither
// rewritten nor listed there with the reason why not.
var routes = map[int16]route{
	0:  {action: rewrite, bound: true, reason: ofNewLeaders}, // Produce
	1:  toThisBroker(ofPartition),                            // Fetch; shown up to 15, as replies name addresses from 16 on
	2:  toThisBroker(ofPartition),                            // ListOffsets
	3:  {action: rewrite, reason: ofAllBrokers},              // Metadata
	4:  brokersOnly(),                                        // LeaderAndIsr
	5:  brokersOnly(),                                        // StopReplica
	6:  brokersOnly(),                                        // UpdateMetadata
	7:  brokersOnly(),                                        // ControlledShutdown
	8:  toCoordinator(),                                      // OffsetCommit
	9:  toCoordinator(),                                      // OffsetFetch
	10: {action: local, reason: ofPlacement},                 // FindCoordinator
	11: toCoordinator(),                                      // JoinGroup
	12: toCoordinator(),                                      // Heartbeat
	13: toCoordinator(),                                      // LeaveGroup
	14: toCoordinator(),                                      // SyncGroup
	15: toCoordinator(),                                      // DescribeGroups
	16: toCoordinator(),                                      // ListGroups
	17: toThisBroker(ofConnection),                           // SaslHandshake
	18: {action: local, reason: ofVersions},                  // ApiVersions
	19: toAnyBroker(),                                        // CreateTopics
	20: toAnyBroker(),                                        // DeleteTopics
	21: toThisBroker(ofPartition),                            // DeleteRecords
	22: toThisBroker(ofTransaction),                          // InitProducerId; without a transactional id any broker has one
	23: toThisBroker(ofPartition),                            // OffsetForLeaderEpoch
	24: toThisBroker(ofTransaction),                          // AddPartitionsToTxn
	25: {action: refuse, reason: ofTransactions},             // AddOffsetsToTxn
	26: toThisBroker(ofTransaction),                          // EndTxn
	27: toThisBroker(ofPartition),                            // WriteTxnMarkers; the admin client aborts transactions with it
	28: {action: refuse, reason: ofTransactions},             // TxnOffsetCommit
	29: toAnyBroker(),                                        // DescribeAcls
	30: toAnyBroker(),                                        // CreateAcls
	31: toAnyBroker(),                                        // DeleteAcls
	32: toThisBroker(ofConfiguration),                        // DescribeConfigs
	33: toThisBroker(ofConfiguration),                        // AlterConfigs
	34: toThisBroker(ofDirectories),                          // AlterReplicaLogDirs
	35: toThisBroker(ofDirectories),                          // DescribeLogDirs
	36: toThisBroker(ofConnection),                           // SaslAuthenticate
	37: toAnyBroker(),                                        // CreatePartitions
	38: toAnyBroker(),                                        // CreateDelegationToken
	39: toAnyBroker(),                                        // RenewDelegationToken
	40: toAnyBroker(),                                        // ExpireDelegationToken
	41: toAnyBroker(),                                        // DescribeDelegationToken
	42: toCoordinator(),                                      // DeleteGroups
	43: toAnyBroker(),                                        // ElectLeaders
	44: toThisBroker(ofConfiguration),                        // IncrementalAlterConfigs
	45: toAnyBroker(),                                        // AlterPartitionReassignments
	46: toAnyBroker(),                                        // ListPartitionReassignments
	47: toCoordinator(),                                      // OffsetDelete
	48: toAnyBroker(),                                        // DescribeClientQuotas
	49: toAnyBroker(),                                        // AlterClientQuotas
	50: toAnyBroker(),                                        // DescribeUserScramCredentials
	51: toAnyBroker(),                                        // AlterUserScramCredentials
	52: brokersOnly(),                                        // Vote
	53: brokersOnly(),                                        // BeginQuorumEpoch
	54: brokersOnly(),                                        // EndQuorumEpoch
	55: toAnyBroker(),                                        // DescribeQuorum
	56: brokersOnly(),                                        // AlterPartition
	57: toAnyBroker(),                                        // UpdateFeatures
	58: brokersOnly(),                                        // Envelope
	59: brokersOnly(),                                        // FetchSnapshot
	60: {action: rewrite, reason: ofAllBrokers},              // DescribeCluster
	61: toThisBroker(ofPartition),                            // DescribeProducers
	62: brokersOnly(),                                        // BrokerRegistration
	63: brokersOnly(),                                        // BrokerHeartbeat
	64: toAnyBroker(),                                        // UnregisterBroker
	65: toThisBroker(ofTransaction),                          // DescribeTransactions
	66: toThisBroker(ofTransaction),                          // ListTransactions; each broker has those it coordinates
	67: brokersOnly(),                                        // AllocateProducerIds
	68: notServed(ofNextGroups),                              // ConsumerGroupHeartbeat
	69: notServed(ofNextGroups),                              // ConsumerGroupDescribe
	70: brokersOnly(),                                        // ControllerRegistration
	71: toAnyBroker(),                                        // GetTelemetrySubscriptions
	72: toAnyBroker(),                                        // PushTelemetry; a broker that does not know the subscription says so, and it is renewed
	73: brokersOnly(),                                        // AssignReplicasToDirs
	74: toAnyBroker(),                                        // ListConfigResources
	75: toAnyBroker(),                                        // DescribeTopicPartitions
	76: notServed(ofShareGroups),                             // ShareGroupHeartbeat
	77: notServed(ofShareGroups),                             // ShareGroupDescribe
	78: notServed(ofShareGroups),                             // ShareFetch
	79: notServed(ofShareGroups),                             // ShareAcknowledge
	80: toAnyBroker(),                                        // AddRaftVoter
	81: toAnyBroker(),                                        // RemoveRaftVoter
	82: brokersOnly(),                                        // UpdateRaftVoter
	83: brokersOnly(),                                        // InitializeShareGroupState
	84: brokersOnly(),                                        // ReadShareGroupState
	85: brokersOnly(),                                        // WriteShareGroupState
	86: brokersOnly(),                                        // DeleteShareGroupState
	87: brokersOnly(),                                        // ReadShareGroupStateSummary
	88: notServed(ofStreams),                                 // StreamsGroupHeartbeat
	89: notServed(ofStreams),                                 // StreamsGroupDescribe
	90: notServed(ofShareGroups),                             // DescribeShareGroupOffsets
	91: notServed(ofShareGroups),                             // AlterShareGroupOffsets
	92: notServed(ofShareGroups),                             // DeleteShareGroupOffsets
	93: notServed(ofStreams),                                 // StreamsGroupTopologyDescriptionUpdate
	94: toAnyBroker(),                                        // UnregisterController
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
