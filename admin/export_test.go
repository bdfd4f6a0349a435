package admin

// CheckAlive is what /livez asks.
func (s *Server) CheckAlive() Check { return s.checkAlive() }
